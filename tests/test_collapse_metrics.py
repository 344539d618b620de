"""Neural collapse in common.py: slow NumPy definitions, exact cases, invariances, hard and dead features."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import common
from common import (
    cdnv,
    class_distances,
    class_means,
    class_sums,
    clustering_agreement,
    collapse_metrics,
    cosines,
    distances,
    equiangularity,
    equinorm,
    generalized_metrics,
    gnc3,
    mean_pairwise_cosine,
    minority_angle,
    nc0,
    nc1,
    nearest_mean_mismatch,
    one_vs_rest_distance,
    riesz_energy,
    self_duality,
    simplex_etf_distance,
    smallest_angle,
    trace_ratio,
    vci,
    zero_mean_metrics,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def around(means, sigma):
    """Features with covariance exactly sigma^2 I around each mean: residuals +-sigma sqrt(d) e_j."""
    K, d = means.shape
    axes = sigma * d**0.5 * torch.eye(d, dtype=torch.float64)
    return (means[:, None] + torch.cat([axes, -axes])).flatten(0, 1), torch.arange(K).repeat_interleave(2 * d)


# %% NC1, trace ratio, CDNV, VCI, class distances

CASES = {
    "balanced": ([12] * 4, 8),
    "long tail": ([60, 20, 7, 3, 2], 8),  # mu_G is the mean of means, Sigma_W is pooled over samples
    "more classes than dimensions": ([4] * 12, 5),
    "two classes": ([5, 30], 4),
    "classes of one sample": ([1, 20, 1, 20], 6),
    "one dimension": ([4, 5, 6], 1),
    "several chunks": ([900, 800, 700], 64),
}


def slow(h, y, K):
    """Everything as it is written down: NumPy, float64, explicit covariances and pseudo-inverses."""
    h, y = np.asarray(h, dtype=np.float64), np.asarray(y)
    mu = np.stack([h[y == k].mean(0) for k in range(K)])
    within = (h - mu[y]).T @ (h - mu[y]) / len(h)
    v = [np.mean(np.sum((h[y == k] - mu[k]) ** 2, 1)) for k in range(K)]
    result = {}
    for name, M in (("nc1", mu - mu.mean(0)), ("znc1", mu)):
        between = M.T @ M / K
        result[name] = np.trace(within @ np.linalg.pinv(between, rcond=1e-10, hermitian=True)) / K
        if name == "nc1":
            result["trace_ratio"] = np.trace(within) / np.trace(between)
            total = np.linalg.pinv(within + between, rcond=1e-12, hermitian=True)
            result["vci"] = 1 - np.trace(total @ between) / min(h.shape[1], K - 1)
    pairs = itertools.combinations(range(K), 2)
    result["cdnv"] = np.mean([(v[i] + v[j]) / (2 * np.sum((mu[i] - mu[j]) ** 2)) for i, j in pairs])
    return result


@pytest.mark.parametrize("sizes, d", CASES.values(), ids=CASES.keys())
def test_against_slow_definitions(sizes, d):
    K = len(sizes)
    h, y = features(sizes, d, shift=2)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(3))
    expected = slow(h, y, K)
    h, y = h[order], y[order]
    sums = class_sums(h, y)
    assert nc1(h, y, sums) == (pytest.approx(expected["nc1"], rel=1e-10), min(K - 1, d))
    assert nc1(h, y, sums, centred=False) == (pytest.approx(expected["znc1"], rel=1e-10), min(K, d))
    assert nc1(h, y) == nc1(h, y, sums)
    assert trace_ratio(h, y) == pytest.approx(expected["trace_ratio"], rel=1e-12)
    assert cdnv(h, y) == pytest.approx(expected["cdnv"], rel=1e-12)
    assert vci(h, y) == pytest.approx(expected["vci"], rel=1e-10)
    assert sums.count.tolist() == sizes
    mu = torch.stack([h[y == k].mean(0) for k in range(K)])
    torch.testing.assert_close(sums.mean, mu)
    torch.testing.assert_close(sums.centred, mu - mu.mean(0))
    torch.testing.assert_close(class_means(h, y, K), mu)


def test_class_distances_are_the_loop_over_pairs_of_samples():
    h, y = features([5, 3, 1, 2], 4, shift=10)
    found = class_distances(h, y)
    for i, j in itertools.product(range(4), repeat=2):
        pairs = [(a, b) for a in range(len(h)) for b in range(len(h)) if a != b and (y[a], y[b]) == (i, j)]
        expected = np.mean([float((h[a] - h[b]).square().sum()) for a, b in pairs]) if pairs else math.nan
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_order_rotation_scale_and_translation_do_not_matter(seed, scale, shift):
    h, y = features([20, 12, 7, 4, 1], 6, seed=seed)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))
    turned, turned_y = (scale * h @ rotation(6, seed) + shift)[order], y[order]
    assert nc1(turned, turned_y) == (pytest.approx(nc1(h, y)[0], rel=1e-6), 4)
    for measure in (trace_ratio, cdnv, vci):
        assert measure(turned, turned_y) == pytest.approx(measure(h, y), rel=1e-6)
    found = class_distances(turned, turned_y)
    torch.testing.assert_close(found, scale**2 * class_distances(h, y), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_the_unit_of_the_features_does_not_matter(power, spread):
    """Float32 features times 2^+-60 (1e18) and 2^+-120 (1e36): the same digits, so the same measures."""
    h, y = features([30, 20, 10, 5], 6, spread, seed=4)
    h, W = h.float(), random(4, 6, seed=5).float()
    unit = 2.0**power
    few = torch.tensor([2, 3])
    prediction = (h @ W.T).argmax(1)
    expected = collapse_metrics(h, y, W, prediction, few)
    assert collapse_metrics(unit * h, y, unit * W, prediction, few) == pytest.approx(expected, rel=1e-12)
    for measure in (trace_ratio, cdnv, vci):
        assert measure(unit * h, y) == pytest.approx(measure(h, y), rel=1e-9, abs=0)
    M, scaled = class_means(h, y, 4), class_means(unit * h, y, 4)
    assert zero_mean_metrics(scaled, unit * W) == pytest.approx(zero_mean_metrics(M, W), rel=1e-9)
    assert generalized_metrics(scaled) == pytest.approx(generalized_metrics(M), rel=1e-9)
    assert gnc3(unit * W, scaled) == pytest.approx(gnc3(W, M), rel=1e-9)
    torch.testing.assert_close(cosines(scaled), cosines(M))
    assert minority_angle(scaled, few) == pytest.approx(minority_angle(M, few), rel=1e-9)


@pytest.mark.parametrize("K, d, r, sigma", [(10, 32, 3.0, 0.2), (4, 4, 0.5, 2.0), (40, 64, 10.0, 1e-3)])
def test_exact_etf_with_isotropic_spread(K, d, r, sigma):
    """Sigma_W = sigma^2 I, and Sigma_B = r^2/(K-1) times a projection of rank K - 1."""
    h, y = around(simplex_etf(K, d, r), sigma)
    assert nc1(h, y) == (pytest.approx(sigma**2 * (K - 1) ** 2 / (K * r**2), rel=1e-9, abs=0), K - 1)
    assert trace_ratio(h, y) == pytest.approx(d * sigma**2 / r**2, rel=1e-9, abs=0)
    assert cdnv(h, y) == pytest.approx(d * sigma**2 * (K - 1) / (2 * K * r**2), rel=1e-9, abs=0)
    share = sigma**2 * (K - 1)
    assert vci(h, y) == pytest.approx(share / (r**2 + share), rel=1e-9, abs=0)


def test_nc1_is_blind_across_the_means_and_the_others_are_not():
    etf = simplex_etf(5, 8)
    across = torch.linalg.svd(etf).Vh[-1]
    h, y = torch.cat([etf + 0.7 * across, etf - 0.7 * across]), torch.arange(5).repeat(2)
    assert 0 <= nc1(h, y)[0] < 1e-15
    assert trace_ratio(h, y) == pytest.approx(0.49)
    assert cdnv(h, y) == pytest.approx(0.49 * 4 / 10)


def naive_nc1(h, y, K):
    """With Sigma_W from sum h h^T - sum n_k mu mu^T: the form that cancels."""
    M = torch.stack([h[y == k].mean(0) for k in range(K)])
    scatter = h.T @ h - (M.T * torch.bincount(y).to(h.dtype)) @ M
    M = M - M.mean(0)
    return float((scatter / len(h) @ torch.linalg.pinv(M.T @ M / K)).trace() / K)


@pytest.mark.parametrize("shift", [0.0, 5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_spread(dtype, shift):
    h, y = features([50] * 10, 32, spread=1e-7, shift=shift)
    h = h.to(dtype)  # float32 rounds the spread to its grid; what is left there is the truth to be found
    expected = slow(h, y, 10)
    assert nc1(h, y) == (pytest.approx(expected["nc1"], rel=1e-5, abs=0), 9)
    assert trace_ratio(h, y) == pytest.approx(expected["trace_ratio"], rel=1e-5, abs=0)
    if shift:
        assert naive_nc1(h, y, 10) != pytest.approx(expected["nc1"], rel=0.01, abs=0)  # this input is hard


@pytest.mark.parametrize("K, d", [(10, 64), (5, 16), (30, 8)])
@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-5])
def test_vci_near_collapse(K, d, spread):
    """1 - tr(...) / r loses all digits here. Truth: SVD of the means, whitened by a Cholesky factor."""
    h, y = features([100] * K, d, spread)
    mu = np.stack([h[y == k].numpy().mean(0) for k in range(K)])
    z = h.numpy() - mu[y]
    L = np.linalg.cholesky(z.T @ z / len(z))
    white = np.linalg.solve(L, (mu - mu.mean(0)).T) / K**0.5
    g = np.linalg.svd(white, compute_uv=False)[: min(d, K - 1)] ** 2
    assert vci(h, y) == pytest.approx(np.mean(1 / (1 + g)), rel=1e-8, abs=0)


def test_vci_of_a_singular_spread():
    """A dead unit changes nothing; a direction without spread in which the means differ is collapsed."""
    h, y = features([20] * 4, 5)
    dead = torch.cat([h, torch.zeros(80, 2)], 1)
    assert vci(dead, y) == pytest.approx(vci(h, y), rel=1e-12)
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double()
    h = torch.cat([means + torch.tensor([0.0, 0.5]), means - torch.tensor([0.0, 0.5])])
    y = torch.arange(3).repeat(2)
    expected = slow(h, y, 3)["vci"]
    assert 0.1 < expected < 0.4
    assert vci(h, y) == pytest.approx(expected, rel=1e-9)


def test_vci_is_left_out_for_many_dimensions(monkeypatch):
    monkeypatch.setattr(common, "VCI_LARGEST_D", 5)
    h, y = features([9, 9], 6)
    assert math.isnan(vci(h, y)) and vci(h[:, :5], y) > 0


@pytest.mark.parametrize("gap", [1e-2, 1e-5])
def test_class_means_that_nearly_coincide_keep_the_rank(gap):
    """Minority collapse before it is complete: a cut-off of float32's size would drop this direction."""
    h, y = features([40] * 6, 8, spread=1e-3)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    h = torch.where((y == 5)[:, None], h - mu[5] + mu[4] + gap * random(8, seed=9), h)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    M, within = ((mu - mu.mean(0)) / 6**0.5).numpy(), (h - mu[y]).numpy()
    inverse = np.linalg.pinv(M, rcond=1e-9)  # pinv(M^T M) = pinv(M) pinv(M)^T, without squaring what is small
    expected = np.square(within @ inverse).sum() / len(h) / 6
    assert nc1(h, y) == (pytest.approx(expected, rel=1e-6, abs=0), 5)
    same = torch.where((y == 5)[:, None], h - mu[5] + mu[4], h)  # and if they do coincide, the rank says so
    assert nc1(same, y) == (pytest.approx(slow(same, y, 6)["nc1"], rel=1e-9), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_low_precision_are_summed_in_float64(dtype):
    h, y = features([300] * 4, 8, shift=3)
    h = h.to(dtype)
    expected = slow(h.double(), y, 4)
    assert nc1(h, y)[0] == pytest.approx(expected["nc1"], rel=1e-10)
    assert cdnv(h, y) == pytest.approx(expected["cdnv"], rel=1e-10)


def test_a_class_without_a_sample():
    h, y = random(4, 3), torch.tensor([0, 0, 1, 3])
    for measure in (nc1, trace_ratio, cdnv, vci, class_distances):
        with pytest.raises(ValueError, match="class 2 has no sample"):
            measure(h, y)
    with pytest.raises(ValueError, match="class 4 has no sample"):
        class_means(torch.ones(4, 3), torch.arange(4), 5)


def test_features_are_neither_changed_nor_followed_by_autograd():
    h, y = features([3, 3], 4)
    before = h.clone()
    h.requires_grad_()
    sums = class_sums(h, y)
    nc1(h, y, sums), vci(h, y, sums)
    assert h.equal(before) and not sums.mean.requires_grad


# %% Where a measure is not defined


@pytest.mark.parametrize("value", [0.0, 0.1, -1e18, 1e-30])
def test_dead_or_equal_features_give_nan(value):
    h, y = torch.full((600, 4), value), torch.arange(600) % 3
    assert nc1(h, y)[1] == 0
    for found in (nc1(h, y)[0], trace_ratio(h, y), cdnv(h, y), vci(h, y)):
        assert math.isnan(found)
    measured = collapse_metrics(h, y, random(3, 4), y, torch.tensor([1, 2]))
    for key in ("nc1", "nc2_equinorm_M", "nc2_equiangular_M", "nc3", "minority_cosine_M"):
        assert math.isnan(measured[key])
    assert all(math.isnan(value) for value in generalized_metrics(class_sums(h, y).centred).values())


@pytest.mark.parametrize("shift", [0.0, 0.1, 5.0, 1e4])
def test_no_class_mean_differs(shift):
    """Every class has the same samples: only rounding is between them, and nothing may be divided by it."""
    h, y = shift + random(20, 32).repeat(10, 1), torch.arange(10).repeat_interleave(20)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found, rank = nc1(h[order], y[order])
    assert math.isnan(found) and rank == 0


def test_coinciding_means_divide_by_zero_openly():
    h, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1])
    assert cdnv(h, y) == math.inf and trace_ratio(h, y) == math.inf and math.isnan(nc1(h, y)[0])
    assert vci(h, y) == 1


@pytest.mark.parametrize("sizes", [[1] * 4, [9, 1, 5, 2]])
def test_complete_collapse_is_zero(sizes):
    h, y = features(sizes, 6, spread=0, shift=2)
    assert nc1(h, y) == (0, 3)
    assert trace_ratio(h, y) == cdnv(h, y) == 0
    assert 0 <= vci(h, y) < 1e-20


def test_one_class():
    h, y = random(5, 3), torch.zeros(5, dtype=torch.long)
    assert nc1(h, y)[1] == 0 and math.isnan(nc1(h, y)[0])
    assert math.isnan(cdnv(h, y)) and math.isnan(vci(h, y))
    assert math.isnan(mean_pairwise_cosine(h, torch.tensor([0])))


# %% NC0, NC2, NC3, NC4


def test_cosines():
    V = random(5, 3)
    expected = [
        [float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for b in V.numpy()] for a in V.numpy()
    ]
    np.testing.assert_allclose(cosines(V), expected, atol=1e-14)
    np.testing.assert_allclose(cosines(1e-6 * V), expected, atol=1e-14)
    assert cosines(V.float()).dtype == torch.float64


def test_cosine_with_a_zero_row_is_zero():
    C = cosines(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]]))
    np.testing.assert_allclose(C, [[1, 0, -1], [0, 0, 0], [-1, 0, 1]], atol=1e-15)


def test_mean_pairwise_cosine():
    V, everything = simplex_etf(4, 6), torch.arange(4)
    assert mean_pairwise_cosine(V, everything) == pytest.approx(-1 / 3)
    assert mean_pairwise_cosine(V, everything[1:3]) == pytest.approx(-1 / 3)
    lengths = torch.tensor([[1.0], [2.0], [3.0]])
    assert mean_pairwise_cosine(V[:1] * lengths, everything[:3]) == pytest.approx(
        1
    )  # one direction: collapse
    # only the classes that are asked for count: rows 0 and 2 are opposite, row 1 is orthogonal to both
    V = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])
    assert mean_pairwise_cosine(V, torch.tensor([0, 2])) == pytest.approx(-1)
    assert mean_pairwise_cosine(V, torch.tensor([0, 1, 2])) == pytest.approx(-1 / 3)


@pytest.mark.parametrize("classes", [[], [1]])
def test_mean_pairwise_cosine_of_fewer_than_two(classes):
    assert math.isnan(mean_pairwise_cosine(random(3, 2), torch.tensor(classes, dtype=torch.long)))


def test_nc0_by_hand():
    assert nc0(torch.tensor([[3.0, 0.0], [0.0, -5.0]])) == pytest.approx((9 + 25) / 2)
    assert nc0(simplex_etf(5, 8, 3.0)) < 1e-25


@pytest.mark.parametrize("K, d", [(2, 2), (10, 32), (100, 100)])
def test_nc2_is_zero_at_an_etf(K, d):
    V = simplex_etf(K, d, norm=7.0)
    assert equinorm(V) < 1e-13
    assert equiangularity(V) < 1e-13


def test_equinorm_by_hand():
    # norms 3 and 5: mean 4, population std 1 (the sample std would be 1.41)
    assert equinorm(torch.tensor([[3.0, 0.0], [0.0, -5.0]])) == pytest.approx(1 / 4)


def test_equiangularity_by_hand():
    assert equiangularity(torch.eye(3)) == pytest.approx(1 / 2)  # cos 0 instead of -1/2
    # cos 1, -1, -1 of three rows: |1 + 1/2|, |-1 + 1/2| twice; signs must not cancel
    V = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])
    assert equiangularity(V) == pytest.approx((3 / 2 + 1 / 2 + 1 / 2) / 3)


def test_self_duality():
    M = random(5, 8)
    assert self_duality(M, M) == pytest.approx(0, abs=1e-15)
    assert self_duality(3 * M, 0.5 * M) == pytest.approx(0, abs=1e-15)  # scale-free on both sides
    assert self_duality(-2 * M, M) == pytest.approx(4)
    W = random(5, 8, seed=1)
    W -= (W * M).sum() / (M * M).sum() * M  # orthogonal as one long vector
    assert self_duality(W, M) == pytest.approx(2)
    assert self_duality(W.float(), M) == pytest.approx(2)


@pytest.mark.parametrize("offset, gap", [(0.0, 1.0), (1e4, 1e-3), (-1e4, 1.0)])
def test_nearest_mean_mismatch_is_the_brute_force_count(offset, gap):
    """Far from the origin too, where |h|^2 - 2 h m + |m|^2 would be rounding only: 1e9 against 1e-6."""
    K, d, N = 30, 16, 200
    M = offset + gap * random(K, d)
    y = torch.randint(K, (N,), generator=torch.Generator().manual_seed(0))
    h = M[y] + gap * random(N, d, seed=1)
    prediction = torch.where(random(N, seed=2) < 0, y, (y + 1) % K)
    wrong = 0
    for feature, said in zip(h.numpy(), prediction.tolist(), strict=True):
        wrong += int(np.argmin([np.sum((feature - mean) ** 2) for mean in M.numpy()])) != said
    assert 0.3 < wrong / N < 0.9
    assert nearest_mean_mismatch(h, prediction, M) == wrong / N


def test_collapse_metrics_at_neural_collapse():
    """Features at the corners of an ETF, class vectors along them, all predictions right."""
    K, d = 5, 8
    W = simplex_etf(K, d, 2.0)
    y = torch.arange(K).repeat_interleave(4)
    measured = collapse_metrics(3 * W[y] + 1, y, W, y, torch.tensor([3, 4]))
    rank, cosine_M, cosine_W = (
        measured.pop(key) for key in ("nc1_rank", "minority_cosine_M", "minority_cosine_W")
    )
    assert rank == K - 1
    assert cosine_M == pytest.approx(-1 / 4) and cosine_W == pytest.approx(-1 / 4)
    assert set(measured) == {
        "nc1", "nc2_equinorm_M", "nc2_equinorm_W", "nc2_equiangular_M", "nc2_equiangular_W", "nc3", "nc4"
    }  # fmt: skip
    assert all(abs(value) < 1e-12 for value in measured.values())


def test_collapse_metrics_are_their_parts():
    """M is centred for NC2, NC3 and the cosines, not for NC4."""
    sizes = [6000, 2500, 400, 100]
    h, y = features(sizes, 6, shift=2)
    h, W = h.float(), random(4, 6, seed=5).float()
    prediction = (h @ W.T).argmax(1)
    few = torch.tensor([2, 3])
    measured = collapse_metrics(h, y, W, prediction, few)
    mu = torch.stack([h[y == k].double().mean(0) for k in range(4)])
    M = mu - mu.mean(0)
    expected = {
        "nc1": slow(h, y, 4)["nc1"],
        "nc1_rank": 3,
        "nc2_equinorm_M": equinorm(M),
        "nc2_equinorm_W": equinorm(W),
        "nc2_equiangular_M": equiangularity(M),
        "nc2_equiangular_W": equiangularity(W),
        "nc3": self_duality(W, M),
        "nc4": nearest_mean_mismatch(h, prediction, mu),
        "minority_cosine_M": mean_pairwise_cosine(M, few),
        "minority_cosine_W": mean_pairwise_cosine(W, few),
    }
    assert measured == pytest.approx(expected, rel=1e-9)
    assert list(measured) == list(expected)


# %% Zero-mean collapse

KEYS = ["znc_equinorm", "znc_mean_cosine", "znc_max_cosine", "znc_cosine_spread", "znc_alignment"]


def blocks(K: int, size: int) -> torch.Tensor:
    """A non-negative orthogonal classifier: class k owns `size` dimensions, (K, K * size), unit rows."""
    return torch.eye(K, dtype=torch.float64).repeat_interleave(size, 1) / size**0.5


@pytest.mark.parametrize("K, size", [(2, 1), (10, 6), (100, 2)])
def test_all_zero_mean_metrics_are_zero_at_collapse(K, size):
    Q = blocks(K, size)
    measured = zero_mean_metrics(5 * Q, Q)
    assert list(measured) == KEYS
    assert all(abs(value) < 1e-14 for value in measured.values())


def test_centring_would_miss_it():
    """The same means, centred, are a simplex ETF, at 2 (1 - sqrt(1 - 1/K)) from Q: 0.10263 for K = 10."""
    Q = blocks(10, 6)
    M = 5 * (Q - Q.mean(0))
    assert equiangularity(M) < 1e-13
    assert self_duality(Q, M) == pytest.approx(2 * (1 - math.sqrt(1 - 1 / 10)), abs=1e-12)
    measured = zero_mean_metrics(M, Q)
    assert measured["znc_mean_cosine"] == pytest.approx(1 / 9)
    assert measured["znc_max_cosine"] == pytest.approx(1 / 9)
    assert measured["znc_alignment"] == pytest.approx(0.10263, abs=1e-5)


def test_zero_mean_metrics_against_a_loop_over_pairs():
    M, W = random(6, 4).numpy(), random(6, 4, seed=1).numpy()
    norms = [math.sqrt(sum(x * x for x in row)) for row in M]
    signed = [float(M[i] @ M[j]) / norms[i] / norms[j] for i in range(6) for j in range(i)]
    pairs = [abs(cosine) for cosine in signed]
    mean = sum(norms) / 6
    expected = {
        "znc_equinorm": math.sqrt(sum((n - mean) ** 2 for n in norms) / 6) / mean,
        "znc_mean_cosine": sum(pairs) / 15,
        "znc_max_cosine": max(pairs),
        "znc_cosine_spread": math.sqrt(sum(c * c for c in signed) / 15 - (sum(signed) / 15) ** 2),
        "znc_alignment": np.sum((W / np.sqrt((W**2).sum()) - M / np.sqrt((M**2).sum())) ** 2),
    }
    assert zero_mean_metrics(torch.tensor(M), torch.tensor(W)) == pytest.approx(expected, rel=1e-12)


def test_opposite_cosines_do_not_cancel():
    M = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])  # cos 0.707, -0.707, 0
    measured = zero_mean_metrics(M)
    assert measured["znc_mean_cosine"] == pytest.approx(2**0.5 / 3)
    assert measured["znc_max_cosine"] == pytest.approx(0.5**0.5)
    assert "znc_alignment" not in measured


@settings(max_examples=15)
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3), K=st.integers(2, 9))
def test_zero_mean_metrics_and_rotation_scale_class_order(seed, scale, K):
    M, W = random(K, 5, seed=seed), random(K, 5, seed=seed + 1)
    R = torch.linalg.qr(random(5, 5, seed=seed + 2))[0]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    turned = zero_mean_metrics(scale * (M @ R)[order], (W @ R)[order])
    assert turned == pytest.approx(zero_mean_metrics(M, W), rel=1e-9, abs=1e-12)


def test_zero_mean_metrics_of_float32():
    M = (blocks(4, 3) + 1e-7 * random(4, 12)).float()
    assert zero_mean_metrics(M) == zero_mean_metrics(M.double())


def test_a_mean_at_the_origin_is_not_orthogonal_to_all():
    M = blocks(3, 2)
    M[1] = 0
    measured = zero_mean_metrics(M)
    assert math.isnan(measured["znc_mean_cosine"]) and math.isnan(measured["znc_max_cosine"])
    with pytest.raises(ValueError, match="1 class"):
        zero_mean_metrics(M[:1])


# %% Geometry of directions


def test_distances_are_subtracted_not_expanded():
    V = 1e4 + 1e-6 * random(6, 5)
    expected = [[math.dist(a, b) for b in V.tolist()] for a in V.tolist()]
    np.testing.assert_allclose(distances(V), expected, rtol=1e-12)


def test_simplex_etf_distance_is_the_formula():
    V, U = random(5, 7), random(5, 7, seed=1)
    E = (np.eye(5) - 1 / 5) / 2
    for A, found in ((V @ V.T, simplex_etf_distance(V)), (V @ U.T, simplex_etf_distance(V, U))):
        A = A.numpy() / np.sqrt((A.numpy() ** 2).sum())
        assert found == pytest.approx(np.sqrt(((A - E) ** 2).sum()), rel=1e-12)
    etf = simplex_etf(100, 128, 7.0)
    assert simplex_etf_distance(etf) < 1e-13 and simplex_etf_distance(etf, 0.1 * etf) < 1e-13


def test_energies_by_hand():
    V = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-5.0, 0.0]])  # unit rows: r = sqrt 2, sqrt 2, 2
    assert riesz_energy(V, 0) == pytest.approx(-(math.log(2) / 2 + math.log(2) / 2 + math.log(2)) / 3)
    assert riesz_energy(V, 1) == pytest.approx((2 / 2**0.5 + 1 / 2) / 3)
    assert riesz_energy(V, 2) == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert riesz_energy(V, -1) == pytest.approx(-(2 * 2**0.5 + 2) / 3)
    assert riesz_energy(V[[0, 0]], 0) == riesz_energy(V[[0, 0]], 2) == math.inf


@pytest.mark.parametrize("K", [2, 3, 10])
def test_generalized_metrics_of_a_simplex(K):
    measured, r2 = generalized_metrics(simplex_etf(K, 16, 5.0)), 2 * K / (K - 1)
    expected = {"log": -math.log(r2) / 2, "riesz1": r2**-0.5, "riesz2": 1 / r2}
    assert {key: measured[f"gnc_{key}_energy"] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert measured["gnc_smallest_angle"] == pytest.approx(math.degrees(math.acos(-1 / (K - 1))), rel=1e-12)
    assert measured["gnc_one_vs_rest"] == pytest.approx(K / (K - 1), rel=1e-12)
    assert 0 <= measured["gnc_one_vs_rest_gap"] < 1e-7


@pytest.mark.parametrize("degrees", [1e-7, 1.0, 90.0, 180.0])
def test_angles_keep_their_digits(degrees):
    t = math.radians(degrees)
    V = torch.tensor([[2.0, 0.0], [5 * math.cos(t), 5 * math.sin(t)]], dtype=torch.float64)
    assert smallest_angle(V) == pytest.approx(degrees, rel=1e-8)
    assert minority_angle(V, torch.tensor([0, 1])) == pytest.approx(degrees, rel=1e-8)


def test_minority_angle_is_of_the_asked_classes():
    V = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    assert minority_angle(V, torch.tensor([0, 2])) == 0
    assert minority_angle(V, torch.tensor([0, 1, 3])) == pytest.approx((90 + 180 + 90) / 3)
    assert math.isnan(minority_angle(V, torch.tensor([1])))


@pytest.mark.parametrize("K, d, seed", [(4, 2, 0), (6, 3, 1), (7, 4, 2), (5, 8, 3)])
def test_one_vs_rest_distance_against_another_solver(K, d, seed):
    V = random(K, d, seed=seed)
    U = (V / V.norm(dim=1, keepdim=True)).numpy()
    upper, gap = one_vs_rest_distance(V)
    for k in range(K):
        rest = np.delete(U, k, 0)
        found = minimize(
            lambda a, rest=rest, k=k: np.sum((U[k] - a @ rest) ** 2),
            np.full(K - 1, 1 / (K - 1)),
            jac=lambda a, rest=rest, k=k: -2 * rest @ (U[k] - a @ rest),
            bounds=[(0, 1)] * (K - 1),
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert float(upper[k]) == pytest.approx(np.sqrt(found.fun), abs=1e-6)
    assert (gap >= 0).all() and gap.max() < 1e-7


def test_one_vs_rest_distance_where_it_is_known():
    ring = torch.arange(12, dtype=torch.float64) * math.tau / 12
    ring = torch.stack([ring.cos(), ring.sin()], 1)
    cross = torch.cat([torch.eye(4), -torch.eye(4)])
    for V, distance in ((ring, 1 - math.cos(math.tau / 12)), (cross, 1.0)):
        upper, gap = one_vs_rest_distance(V)
        torch.testing.assert_close(upper, torch.full_like(upper, distance), rtol=0, atol=1e-7)
        assert gap.max() < 1e-7
    upper, gap = one_vs_rest_distance(
        random(5, 3)[[0, 1, 2, 3, 3]]
    )  # two equal rows are in each other's hull
    assert upper[3:].max() < 1e-7 and upper[:3].min() > 0 and gap.max() < 1e-7
    with pytest.raises(ValueError, match="no rest"):
        one_vs_rest_distance(torch.ones(1, 3))


@pytest.mark.parametrize("kind", ["spectrum", "clusters", "collapsed"])
def test_one_vs_rest_distance_of_uneven_directions(kind):
    """Directions on which first-order steps alone stop at a gap of 1e-5."""
    V = random(60, 20)
    if kind == "spectrum":
        V = V / torch.arange(1, 21)
    if kind == "clusters":
        V = V[:12].repeat_interleave(5, 0) + 0.1 * V
    if kind == "collapsed":
        V[30:] = V[30] + 1e-3 * V[:30]
    _, gap = one_vs_rest_distance(V)
    assert gap.max() < 1e-7


def test_the_gap_is_honest_when_stopped_early():
    V = random(30, 6) / torch.arange(1, 7)
    exact, _ = one_vs_rest_distance(V, tolerance=1e-12)
    upper, gap = one_vs_rest_distance(V, steps=3)
    assert gap.max() > 1e-3  # three steps are too few, and it says so
    assert (upper >= exact - 1e-9).all() and (upper - gap <= exact + 1e-9).all()


def test_gnc3():
    M = simplex_etf(4, 6)
    assert gnc3(3 * M.float(), M) == pytest.approx(0, abs=1e-6)
    assert gnc3(-M, M) == pytest.approx(2)
    lengths = torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    assert gnc3(lengths * M[[1, 0, 3, 2]], M) == pytest.approx(4 / 3)  # cos -1/3 with another class's mean


# %% Clustering agreement


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30))
def test_agreement_against_counting(pairs):
    cluster, y = np.array(pairs).T
    N, found = len(y), clustering_agreement(cluster, y)
    purity = sum(np.bincount(y[cluster == c]).max() for c in set(cluster.tolist())) / N
    best = max(sum(np.array(p)[cluster] == y) for p in itertools.permutations(range(3))) / N
    assert found["purity"] == pytest.approx(purity) and found["matched"] == pytest.approx(best)

    def entropy(labels):
        p = np.unique(labels, return_counts=True, axis=0)[1] / N
        return -(p * np.log(p)).sum()

    both = entropy(cluster) + entropy(y)
    shared = both - entropy(np.stack([cluster, y], 1))
    assert found["nmi"] == pytest.approx(2 * shared / both if both > 1e-12 else 1.0, abs=1e-9)
    i, j = np.triu_indices(N, 1)
    same_c, same_y = cluster[i] == cluster[j], y[i] == y[j]
    chance = same_c.sum() * same_y.sum() / len(i)
    top = (same_c.sum() + same_y.sum()) / 2
    expected = ((same_c & same_y).sum() - chance) / (top - chance) if top != chance else 1.0
    assert found["ari"] == pytest.approx(expected, abs=1e-9)


def test_agreement_does_not_see_the_numbering():
    y = np.array([0, 0, 1, 1, 2, 2, 2])
    assert set(clustering_agreement(np.array([7, 7, 3, 3, 5, 5, 5]), y).values()) == {1.0}
    split = clustering_agreement(np.array([0, 4, 1, 1, 2, 2, 3]), y)  # pure, but more clusters than classes
    assert split["purity"] == 1 and split["matched"] == pytest.approx(5 / 7)
