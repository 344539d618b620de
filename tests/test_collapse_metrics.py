"""The further metrics of common.py: slow NumPy definitions, exact cases, invariances, hard numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from common import (
    CollapseStatistics,
    StoredStatistics,
    clustering_agreement,
    distances,
    generalized_metrics,
    gnc3,
    minority_angle,
    one_vs_rest_distance,
    riesz_energy,
    simplex_etf_distance,
    smallest_angle,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(random(d, d, seed=seed))[0]


def simplex_etf(K, d, norm=1.0):
    corners = (torch.eye(K, dtype=torch.float64) - 1 / K) * (K / (K - 1)) ** 0.5
    return norm * corners @ rotation(max(d, K))[:K, :d]


def features(sizes, d, spread=1.0, shift=0.0, seed=0):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return shift + random(len(sizes), d, seed=seed)[y] + spread * random(len(y), d, seed=seed + 1), y


def one_pass(h, y, K, batch_size=7, order=None):
    S = CollapseStatistics(K, h.shape[1])
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(3)) if order is None else order
    for part in order.split(batch_size):
        S.update(h[part], y[part])
    return S


def stored(h, y, K):
    return StoredStatistics(h, y, K)


BOTH = pytest.mark.parametrize("statistics", [one_pass, stored])

CASES = {
    "balanced": ([12] * 4, 8),
    "long tail": ([60, 20, 7, 3, 2], 8),
    "more classes than dimensions": ([4] * 12, 5),
    "two classes": ([5, 30], 4),
    "classes of one sample": ([1, 20, 1, 20], 6),
    "one dimension": ([4, 5, 6], 1),
    "longer than a chunk": ([900, 800, 700], 3),
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


@BOTH
@pytest.mark.parametrize("sizes, d", CASES.values(), ids=CASES.keys())
def test_against_slow_definitions(statistics, sizes, d):
    K = len(sizes)
    h, y = features(sizes, d, shift=2)
    S, expected = statistics(h, y, K), slow(h, y, K)
    assert S.nc1()[0] == pytest.approx(expected["nc1"], rel=1e-9)
    assert S.nc1()[1] == min(K - 1, d)
    assert S.nc1(centred=False)[0] == pytest.approx(expected["znc1"], rel=1e-9)
    assert S.nc1(centred=False)[1] == min(K, d)
    assert S.trace_ratio() == pytest.approx(expected["trace_ratio"], rel=1e-12)
    assert S.cdnv() == pytest.approx(expected["cdnv"], rel=1e-12)
    if statistics is one_pass:
        assert S.vci() == pytest.approx(expected["vci"], rel=1e-8)


@BOTH
def test_class_distances_are_the_loop_over_pairs_of_samples(statistics):
    h, y = features([5, 3, 1, 2], 4, shift=10)
    found = statistics(h, y, 4).class_distances()
    for i, j in itertools.product(range(4), repeat=2):
        pairs = [(a, b) for a in range(len(h)) for b in range(len(h)) if a != b and (y[a], y[b]) == (i, j)]
        expected = np.mean([float((h[a] - h[b]).square().sum()) for a, b in pairs]) if pairs else math.nan
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 99),
    batch_size=st.integers(1, 70),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_batches_rotation_scale_and_translation_do_not_matter(seed, batch_size, scale, shift):
    h, y = features([20, 12, 7, 4, 1], 6, seed=seed)
    whole = one_pass(h, y, 5, len(h))
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))
    turned = scale * h @ rotation(6, seed) + shift
    for S in (one_pass(turned, y, 5, batch_size, order), stored(turned[order], y[order], 5)):
        assert S.nc1()[0] == pytest.approx(whole.nc1()[0], rel=1e-6)
        for name in ("trace_ratio", "cdnv"):
            assert getattr(S, name)() == pytest.approx(getattr(whole, name)(), rel=1e-6)
        expected = scale**2 * whole.class_distances()
        torch.testing.assert_close(S.class_distances(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert one_pass(turned, y, 5, batch_size, order).vci() == pytest.approx(whole.vci(), rel=1e-6)


@BOTH
@pytest.mark.parametrize("K, d, r, sigma", [(10, 32, 3.0, 0.2), (4, 4, 0.5, 2.0), (40, 64, 10.0, 1e-3)])
def test_exact_etf_with_isotropic_spread(statistics, K, d, r, sigma):
    axes = sigma * d**0.5 * torch.eye(d, dtype=torch.float64)
    h = (simplex_etf(K, d, r)[:, None] + torch.cat([axes, -axes])).flatten(0, 1)
    S = statistics(h, torch.arange(K).repeat_interleave(2 * d), K)
    assert S.nc1()[0] == pytest.approx(sigma**2 * (K - 1) ** 2 / (K * r**2), rel=1e-9, abs=0)
    assert S.trace_ratio() == pytest.approx(d * sigma**2 / r**2, rel=1e-9, abs=0)
    assert S.cdnv() == pytest.approx(d * sigma**2 * (K - 1) / (2 * K * r**2), rel=1e-9, abs=0)
    if statistics is one_pass:
        share = sigma**2 * (K - 1)
        assert S.vci() == pytest.approx(share / (r**2 + share), rel=1e-9, abs=1e-10)


@BOTH
def test_nc1_is_blind_across_the_means_and_the_others_are_not(statistics):
    etf = simplex_etf(5, 8)
    across = torch.linalg.svd(etf).Vh[-1]
    h = torch.cat([etf + 0.7 * across, etf - 0.7 * across])
    S = statistics(h, torch.arange(5).repeat(2), 5)
    assert 0 <= S.nc1()[0] < 1e-15
    assert S.trace_ratio() == pytest.approx(0.49)
    assert S.cdnv() == pytest.approx(0.49 * 4 / 10)


@BOTH
@pytest.mark.parametrize("shift", [0.0, 5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_spread(statistics, dtype, shift):
    h, y = features([50] * 10, 32, spread=1e-7, shift=shift)
    h = h.to(dtype)  # float32 rounds the spread to its grid; what is left there is the truth to be found
    S, expected = statistics(h, y, 10), slow(h, y, 10)
    assert S.nc1()[0] > 0
    assert S.nc1()[0] == pytest.approx(expected["nc1"], rel=1e-3, abs=0)
    assert S.trace_ratio() == pytest.approx(expected["trace_ratio"], rel=1e-3, abs=0)


@BOTH
@pytest.mark.parametrize("gap", [1e-2, 1e-5])
def test_class_means_that_nearly_coincide_keep_the_rank(statistics, gap):
    h, y = features([40] * 6, 8, spread=1e-3)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    h = torch.where((y == 5)[:, None], h - mu[5] + mu[4] + gap * random(8, seed=9), h)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    M, within = ((mu - mu.mean(0)) / 6**0.5).numpy(), (h - mu[y]).numpy()
    inverse = np.linalg.pinv(M, rcond=1e-9)  # pinv(M^T M) = pinv(M) pinv(M)^T, without squaring what is small
    expected = np.square(within @ inverse).sum() / len(h) / 6
    nc1, rank = statistics(h, y, 6).nc1()
    assert rank == 5 and nc1 == pytest.approx(expected, rel=1e-3, abs=0)
    same = torch.where((y == 5)[:, None], h - mu[5] + mu[4], h)  # and if they do coincide, the rank says so
    assert statistics(same, y, 6).nc1()[1] == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_features_of_low_precision(dtype):
    h, y = features([300] * 4, 8, shift=3)
    h = h.to(dtype)
    S, expected = stored(h, y, 4), slow(h.double(), y, 4)
    assert S.nc1()[0] == pytest.approx(expected["nc1"], rel=1e-6)
    assert S.cdnv() == pytest.approx(expected["cdnv"], rel=1e-6)


@BOTH
def test_a_class_without_a_sample(statistics):
    S = statistics(random(4, 3), torch.tensor([0, 0, 1, 3]), 4)
    for ask in (S.nc1, S.trace_ratio, S.cdnv, S.class_distances):
        with pytest.raises(ValueError, match="class 2 "):
            ask()


def test_stored_features_take_no_batches():
    with pytest.raises(TypeError, match="all features at once"):
        stored(random(4, 3), torch.tensor([0, 0, 1, 1]), 2).update(random(1, 3), torch.tensor([0]))


def test_coinciding_means_divide_by_zero_openly():
    h, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1])
    S = one_pass(h, y, 2)
    assert S.cdnv() == math.inf and S.trace_ratio() == math.inf and math.isnan(S.nc1()[0])


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


def test_the_gap_is_honest_when_stopped_early():
    V = random(30, 6)
    exact, _ = one_vs_rest_distance(V, tolerance=1e-12, steps=20_000)
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
