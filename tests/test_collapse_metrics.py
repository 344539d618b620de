"""Neural collapse in common.py: slow NumPy definitions, closed forms, invariants, hard and dead features."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import common


def equiangularity(V):
    """As nc_metrics.py has it: mean over pairs of |cos + 1/(K-1)|."""
    return float((common.pairwise_cosines(V) + 1 / (len(V) - 1)).abs().mean())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def rotation(d, seed=0):
    return torch.linalg.qr(random(d, d, seed=seed))[0]


def simplex_etf(K, d, norm=1.0):
    """K vectors of one length, every two at cosine -1/(K-1), turned at random."""
    corners = (torch.eye(K, dtype=torch.float64) - 1 / K) * (K / (K - 1)) ** 0.5
    return norm * corners @ rotation(max(d, K))[:K, :d]


def features(sizes, d, spread=1.0, shift=0.0, seed=0):
    """Features of class means ~ N(0, 1) around `shift` with residuals ~ spread N(0, 1), and their labels."""
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return shift + random(len(sizes), d, seed=seed)[y] + spread * random(len(y), d, seed=seed + 1), y


def measures(h, y, W, few):
    """Every number that is measured of features h and class vectors W, under its usual name."""
    M = common.class_means(h, y, len(W))
    values = dict(nc1=common.nc1(h, y, len(W)), znc1=common.nc1(h, y, len(W), centred=False))
    found = {f"{name}_rank": rank for name, (_, rank) in values.items()}
    found |= {name: value for name, (value, _) in values.items()} | common.zero_mean_metrics(M, W)
    found["nc4"] = float((common.logits(h, W).argmax(1) != common.nearest_mean(h, M)).double().mean())
    found |= {"gnc1": common.nc1(common.unit(h).nan_to_num(), y)[0], "cdnv": common.cdnv(h, y)}
    M -= M.mean(0)
    found["nc3"] = common.self_duality(W, M)
    for name, V in ("M", M), ("W", W):
        found |= {f"equinorm_{name}": common.equinorm(V), f"angles_{name}": equiangularity(V)}
        found |= {
            f"few_{name}": common.mean_pairwise_cosine(V, few),
            f"least_{name}": common.smallest_angle(V),
        }
        found[f"margin_{name}"] = float(common.one_vs_rest_distance(V).mean())
    return found


# %% NC1, CDNV, class distances


def slow(h, y, K, W):
    """Everything as it is written down: NumPy, float64, explicit covariances and pseudo-inverses."""
    mu = np.stack([h[y == k].mean(0) for k in range(K)])
    within = (h - mu[y]).T @ (h - mu[y]) / len(h)
    v = [np.mean(np.sum((h[y == k] - mu[k]) ** 2, 1)) for k in range(K)]
    pairs = list(itertools.combinations(range(K), 2))
    norms = [math.dist(row, 0 * row) for row in mu]
    cosines = [abs(float(mu[i] @ mu[j])) / norms[i] / norms[j] for i, j in pairs]
    result = {
        "cdnv": np.mean([(v[i] + v[j]) / (2 * np.sum((mu[i] - mu[j]) ** 2)) for i, j in pairs]),
        "znc_equinorm": math.sqrt(sum((n - sum(norms) / K) ** 2 for n in norms) / K) / (sum(norms) / K),
        "znc_mean_cosine": sum(cosines) / len(cosines),
        "znc_max_cosine": max(cosines),
        "znc_alignment": np.sum((W / np.sqrt((W**2).sum()) - mu / np.sqrt((mu**2).sum())) ** 2),
    }
    for name, M in (("nc1", mu - mu.mean(0)), ("znc1", mu)):
        inverse = np.linalg.pinv(M.T @ M / K, rcond=1e-10, hermitian=True)
        result[name] = np.trace(within @ inverse) / K
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes, d", [
    ([60, 20, 7, 3, 2], 8),  # a long tail: mu_G is the mean of means, Sigma_W is pooled over samples
    ([4] * 12, 5),  # more classes than dimensions
    ([1, 20, 1, 20], 6),
])  # fmt: skip
def test_against_slow_definitions(sizes, d, dtype):
    """Low precision too: summed in float64, without autograd's graph."""
    K = len(sizes)
    h, y = features(sizes, d, shift=2)
    h, W, order = h.to(dtype), random(K, d, seed=7), permutation(len(h))
    expected = slow(h.double().numpy(), y.numpy(), K, W.numpy())
    h, y = h[order].requires_grad_(), y[order]
    found = measures(h, y, W, torch.tensor([0, 1]))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert found["nc1_rank"] == min(K - 1, d)
    assert found["znc1_rank"] == min(K, d)
    n, mean, v = common.class_sums(h, y)
    assert n.tolist() == sizes and not mean.requires_grad and not v.requires_grad


def test_class_distances_are_the_loop_over_pairs_of_samples():
    h, y = features([5, 3, 1, 2], 4, shift=10)
    found = common.class_distances(h, y)
    for i, j in itertools.product(range(4), repeat=2):
        pairs = [(a, b) for a in range(len(h)) for b in range(len(h)) if a != b and (y[a], y[b]) == (i, j)]
        expected = np.mean([float((h[a] - h[b]).square().sum()) for a, b in pairs]) if pairs else math.nan
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("K, d, r, sigma", [(10, 32, 3.0, 0.2), (4, 4, 0.5, 2.0), (40, 64, 10.0, 1e-3)])
def test_an_etf_with_isotropic_spread(K, d, r, sigma):
    """Sigma_W = sigma^2 I, and Sigma_B = r^2/(K-1) times a projection of rank K - 1."""
    axes = sigma * d**0.5 * torch.eye(d, dtype=torch.float64)
    h = (simplex_etf(K, d, r)[:, None] + torch.cat([axes, -axes])).flatten(0, 1)
    y = torch.arange(K).repeat_interleave(2 * d)
    assert common.nc1(h, y) == (pytest.approx(sigma**2 * (K - 1) ** 2 / (K * r**2), rel=1e-9, abs=0), K - 1)
    assert common.cdnv(h, y) == pytest.approx(d * sigma**2 * (K - 1) / (2 * K * r**2), rel=1e-9, abs=0)


def test_nc1_is_blind_across_the_means_and_cdnv_is_not():
    etf = simplex_etf(5, 8)
    across = 0.7 * torch.linalg.svd(etf).Vh[-1]
    h, y = torch.cat([etf + across, etf - across]), torch.arange(5).repeat(2)
    assert 0 <= common.nc1(h, y)[0] < 1e-15
    assert common.cdnv(h, y) == pytest.approx(0.49 * 4 / 10)


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_spread_far_from_the_origin(dtype, shift):
    h, y = features([50] * 10, 32, spread=1e-7, shift=shift)
    h = h.to(dtype)  # float32 rounds the spread to its grid; what is left there is the truth to be found
    expected = slow(h.double().numpy(), y.numpy(), 10, np.ones((10, 32)))
    assert common.nc1(h, y) == (pytest.approx(expected["nc1"], rel=1e-5, abs=0), 9)
    assert common.cdnv(h, y) == pytest.approx(expected["cdnv"], rel=1e-5, abs=0)


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 0])
def test_class_means_that_nearly_coincide_keep_the_rank(gap):
    """Minority collapse before it is complete: a cut-off of float32's size would drop this direction."""
    h, y = features([40] * 6, 8, spread=1e-3)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    h = torch.where((y == 5)[:, None], h - mu[5] + mu[4] + gap * random(8, seed=9), h)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    M, within = ((mu - mu.mean(0)) / 6**0.5).numpy(), (h - mu[y]).numpy()
    inverse = np.linalg.pinv(M, rcond=1e-9)  # pinv(M^T M) = pinv(M) pinv(M)^T, without squaring what is small
    expected = np.square(within @ inverse).sum() / len(h) / 6
    assert common.nc1(h, y) == (pytest.approx(expected, rel=1e-6, abs=0), 5 if gap else 4)


# %% Invariants of all measures


@settings(max_examples=15)
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_rotation_scale_order_and_numbering_do_not_matter(seed, scale):
    h, y = features([20, 12, 7, 4, 1], 6, shift=1, seed=seed)
    W, few = random(5, 6, seed=seed + 2), torch.tensor([2, 3, 4])
    R, order, number = rotation(6, seed), permutation(len(h), seed), permutation(5, seed)
    there = torch.empty_like(W).index_copy_(0, number, W)  # class k is called number[k]
    expected = measures(h, y, W, few)
    turned = measures(scale * h[order] @ R, number[y[order]], there @ R, number[few])
    assert turned == pytest.approx(expected, rel=1e-7, abs=1e-9)
    moved = measures(h + scale * random(6, seed=seed), y, W, few)
    of_the_origin = {key: moved[key] for key in moved if key[:3] == "znc" or key in ("gnc1", "nc4")}
    assert moved == pytest.approx(expected | of_the_origin, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_the_unit_of_the_features_does_not_matter(power, spread):
    """Float32 features times 2^+-60 (1e18) and 2^+-120 (1e36): the same digits, so the same measures."""
    h, y = features([30, 20, 10, 5], 6, spread, seed=4)
    h, W, few = h.float(), random(4, 6, seed=5).float(), torch.tensor([2, 3])
    expected = measures(h, y, W, few)
    assert expected["nc1_rank"] == 3 and expected["nc1"] > 0
    assert measures(2.0**power * h, y, 2.0**power * W, few) == pytest.approx(expected, rel=1e-9, abs=0)


# %% Where a measure is not defined


@pytest.mark.parametrize("value", [0.0, 0.1, -1e18, 1e-30, math.nan, math.inf])
def test_dead_equal_or_infinite_features_give_nan(value):
    h, y = torch.full((600, 4), value), (torch.arange(600) % 7).clamp(max=2)
    found = measures(h, y, random(3, 4), torch.tensor([1, 2]))
    assert found["nc1_rank"] == 0
    for key in "nc1 equinorm_M angles_M nc3 few_M cdnv least_M margin_M".split():
        assert math.isnan(found[key]), key


def test_no_class_mean_differs():
    """Every class has the same samples: only rounding is between them, and nothing may be divided by it."""
    h, y, order = random(20, 32).repeat(10, 1), torch.arange(10).repeat_interleave(20), permutation(200)
    for shift in (0.0, 0.1, 1e4):
        assert str(common.nc1(shift + h[order], y[order])) == "(nan, 0)"


def test_a_class_without_samples():
    """Its mean is nan, and so is what needs all means; NC4 is over what is there."""
    h, y = features([9, 6, 5, 4], 6, spread=0.1)
    W, there, few = common.class_means(h, y, 4), y != 2, torch.tensor([2, 3])
    whole = measures(h, y, W, few)
    h, y = h[there], y[there]
    M = common.class_means(h, y, 4)
    assert common.nearest_mean(M[[0, 1, 3]].mean(0, keepdim=True), M) != 2
    found = measures(h, y, W, few)
    nearest = [np.nanargmin(np.linalg.norm(M.numpy() - feature, axis=1)) for feature in h.numpy()]
    wrong = np.mean(nearest != common.logits(h, W).argmax(1).numpy())
    expected = {key: whole[key] if key.endswith("_W") else math.nan for key in whole}
    expected |= {"nc1_rank": 0, "znc1_rank": 0, "nc4": wrong}
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_equal_means_and_complete_collapse():
    h, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1])
    assert common.cdnv(h, y) == math.inf and math.isnan(common.nc1(h, y)[0])
    h, y = features([9, 1, 5, 2], 6, spread=0, shift=2)
    assert common.nc1(h, y) == (pytest.approx(0, abs=1e-28), 3)
    assert common.cdnv(h, y) < 1e-28
    assert math.isnan(common.mean_pairwise_cosine(h, torch.tensor([1])))


# %% NC2, NC3, NC4


def test_cosines():
    V = random(5, 3) * torch.tensor([[1], [1], [0], [1], [1]])  # a row of zeros: cosine 0
    expected = [[a @ b / max(a.norm() * b.norm(), 1e-9) for b in V] for a in V]
    np.testing.assert_allclose(common.cosines(V), expected, atol=1e-14)
    opposite = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])
    assert common.mean_pairwise_cosine(opposite, torch.tensor([0, 2])) == -1  # of the asked rows only
    assert common.mean_pairwise_cosine(opposite, torch.arange(3)) == pytest.approx(-1 / 3)
    assert common.mean_pairwise_cosine(simplex_etf(4, 6), torch.tensor([1, 2])) == pytest.approx(-1 / 3)


def test_nc2_and_nc3_by_hand():
    V = torch.tensor([[3.0, 0.0], [0.0, -5.0]])
    assert common.equinorm(V) == pytest.approx(1 / 4)  # norms 3 and 5; the sample std would give 0.35
    assert equiangularity(torch.eye(3)) == pytest.approx(1 / 2)  # cos 0 instead of -1/2
    line = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])  # cos 1, -1, -1: signs must not cancel
    assert equiangularity(line) == pytest.approx((3 / 2 + 1 / 2 + 1 / 2) / 3)
    M, W = random(5, 8), random(5, 8, seed=1)
    across = W - (W * M).sum() / (M * M).sum() * M  # orthogonal as one long vector
    for vectors, expected in ((3 * M, 0), (-2 * M, 4), (across, 2)):
        assert common.self_duality(vectors, M) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("K, d", [(2, 2), (10, 32), (100, 100)])
def test_an_etf_is_exact(K, d):
    V = simplex_etf(K, d, norm=7.0)
    y = torch.arange(K).repeat(3)
    found = measures(3 * V[y] + 1, y, V, torch.tensor([0, 1]))
    for key in "nc1 equinorm_M equinorm_W angles_M angles_W nc3 nc4".split():
        assert abs(found[key]) < 1e-12, key
    assert found["nc1_rank"] == K - 1
    assert found["few_M"] == pytest.approx(-1 / (K - 1))
    expected = math.degrees(math.acos(-1 / (K - 1)))
    assert found["least_W"] == pytest.approx(expected, abs=1e-12 if K > 2 else 1e-5)
    assert found["margin_M"] == pytest.approx(K / (K - 1), rel=1e-12)


@pytest.mark.parametrize("offset, gap", [(0.0, 1.0), (1e4, 1e-3)])
def test_the_nearest_mean_is_the_brute_force_one(offset, gap):
    """Far from the origin too, where |h|^2 - 2 h m + |m|^2 would be rounding only: 1e9 against 1e-6."""
    M = offset + gap * random(30, 16)
    h = M[torch.arange(200) % 30] + gap * random(200, 16, seed=1)
    nearest = [np.argmin([np.sum((feature - mean) ** 2) for mean in M.numpy()]) for feature in h.numpy()]
    assert common.nearest_mean(h, M).tolist() == nearest and len(set(nearest)) > 20


# %% Zero-mean collapse


def test_zero_mean_metrics_at_collapse_and_why_centring_would_miss_it():
    """Class k owns six dimensions. Centred, the means are an ETF, at 2 (1 - sqrt(1 - 1/K)) from Q."""
    K = 10
    Q = torch.eye(K, dtype=torch.float64).repeat_interleave(6, 1) / 6**0.5
    assert all(abs(value) < 1e-14 for value in common.zero_mean_metrics(5 * Q, Q).values())
    M = 5 * (Q - Q.mean(0))
    assert equiangularity(M) < 1e-13
    found = common.zero_mean_metrics(M, Q)
    assert found["znc_mean_cosine"] == pytest.approx(1 / 9) == found["znc_max_cosine"]
    assert found["znc_alignment"] == pytest.approx(2 * (1 - math.sqrt(1 - 1 / K)), rel=1e-12)
    Q[1] = 0  # a mean at the origin is not orthogonal to all
    assert math.isnan(common.zero_mean_metrics(Q)["znc_max_cosine"])


# %% Geometry of directions


@pytest.mark.parametrize("degrees", [1e-7, 1.0, 90.0, 120.0])
def test_close_rows_keep_their_digits(degrees):
    t = math.radians(degrees)
    V = torch.tensor([[2.0, 0.0], [5 * math.cos(t), 5 * math.sin(t)]], dtype=torch.float64)
    assert common.smallest_angle(V) == pytest.approx(degrees, rel=1e-8)


@pytest.mark.parametrize("kind", ["few", "even", "uneven", "collapsed"])
def test_one_vs_rest_distance_against_another_solver(kind):
    V = random(5, 8) if kind == "few" else random(12, 4)
    if kind == "uneven":
        V = V / torch.arange(1, 5) ** 2
    if kind == "collapsed":
        V[6:] = V[6] + 0.01 * V[:6]
    U = common.unit(V).numpy()
    for k, distance in enumerate(common.one_vs_rest_distance(V).tolist()):
        D = np.delete(U, k, 0) - U[k]
        limits = {"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like}
        options = {"bounds": [(0, 1)] * len(D), "options": {"ftol": 1e-16, "maxiter": 500}}
        square = lambda a, D=D: (np.sum((a @ D) ** 2), 2 * D @ (a @ D))  # noqa: E731
        found = minimize(square, np.full(len(D), 1 / len(D)), jac=True, constraints=limits, **options)
        assert distance == pytest.approx(np.sqrt(found.fun), abs=1e-6)


def test_one_vs_rest_distance_where_it_is_known():
    ring = torch.arange(10, dtype=torch.float64) * math.tau / 10
    ring = torch.stack([ring.cos(), ring.sin()], 1)
    cross = torch.cat([torch.eye(4), -torch.eye(4)])
    for V, distance in ((ring, 1 - math.cos(math.tau / 10)), (cross, 1.0), (simplex_etf(10, 32), 10 / 9)):
        np.testing.assert_allclose(common.one_vs_rest_distance(V), distance, rtol=0, atol=1e-12)
    V = random(5, 3)[[0, 1, 2, 3, 3]]
    distance = common.one_vs_rest_distance(V)
    assert distance[3:].max() < 1e-12 and distance[:3].min() > 0.1  # two equal rows are in each other's hull
    V[1] = 0
    assert common.one_vs_rest_distance(V).isnan().all()
