"""The metrics half of common.py against plain loops, NumPy in float64 and worked-out cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import (
    CollapseStatistics,
    accuracy_per_class,
    collapse_metrics,
    cosines,
    equiangularity,
    equinorm,
    expected_calibration_error,
    mean_pairwise_cosine,
    nearest_mean_mismatch,
    self_duality,
    shot_groups,
)

# %% Accuracy, class sizes, calibration


def test_accuracy_per_class():
    y = torch.tensor([0, 0, 0, 1, 1, 3])
    prediction = torch.tensor([0, 2, 0, 1, 1, 0])
    accuracy = accuracy_per_class(prediction, y, 4)
    np.testing.assert_array_equal(accuracy, [2 / 3, 1, math.nan, 0])  # no sample of class 2: nan, not 0


def members(groups: dict[str, torch.Tensor]) -> list[list[int]]:
    assert list(groups) == ["many", "medium", "few"]
    return [group.tolist() for group in groups.values()]


def test_shot_groups_by_the_rule():
    groups, rule = shot_groups(torch.tensor([19, 500, 101, 100, 20, 1]))  # the bounds themselves are medium
    assert members(groups) == [[1, 2], [3, 4], [0, 5]]
    assert "100" in rule and "20" in rule


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([1, 2, 3, 4, 5, 6, 7], [[4, 5, 6], [2, 3], [0, 1]]),
        ([9, 9, 9, 9, 9, 9], [[0, 1], [2, 3], [4, 5]]),  # ties in label order
        ([500, 101, 100, 20], [[0, 1], [2], [3]]),  # by the rule none would be few
        ([500, 300, 10, 5, 4, 3], [[0, 1], [2, 3], [4, 5]]),  # none medium
    ],
)
def test_shot_groups_in_thirds_where_the_rule_leaves_one_empty(counts, expected):
    groups, rule = shot_groups(torch.tensor(counts))
    assert members(groups) == expected
    assert "thirds" in rule


@given(counts=st.lists(st.integers(1, 200), min_size=3, max_size=12))
def test_every_class_is_in_one_shot_group_and_none_outranks_a_larger_one(counts):
    many, medium, few = members(shot_groups(torch.tensor(counts))[0])
    assert sorted(many + medium + few) == list(range(len(counts)))
    assert many and medium and few
    size = counts.__getitem__
    assert min(map(size, many)) >= max(map(size, medium)) and min(map(size, medium)) >= max(map(size, few))


def calibration_error_by_loop(probability: list[list[float]], y: list[int], bins: int) -> float:
    error = 0.0
    for b in range(bins):
        inside = [(max(p), p.index(max(p)) == t) for p, t in zip(probability, y, strict=True)]
        inside = [(c, right) for c, right in inside if b / bins < c <= (b + 1) / bins]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / len(y) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_loops(bins):
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(500, 4, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    y = torch.randint(4, (500,), generator=generator)
    expected = calibration_error_by_loop(probability.tolist(), y.tolist(), bins)
    assert expected > 0.1
    assert expected_calibration_error(probability, y, bins) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_uses_fifteen_bins():
    probability = torch.tensor([[0.66, 0.34], [0.67, 0.33]], dtype=torch.float64)  # 10/15 is in between
    y = torch.tensor([1, 0])
    assert expected_calibration_error(probability, y) == pytest.approx((0.66 + 0.33) / 2)
    for bins in 10, 14, 16, 20:  # in one bin, wrong and right make up for each other
        assert expected_calibration_error(probability, y, bins) == pytest.approx(abs(1 - 1.33) / 2)


def test_calibration_error_at_a_bin_edge():
    """Bins are open on the left: 1/2 belongs to (0, 1/2], so 1/2 wrong and 3/4 right are in two bins."""
    probability, y = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([1, 1])
    # 1/2 |0 - 1/2| + 1/2 |1 - 3/4|; in one bin it would be |1/2 - 5/8| = 1/8
    assert expected_calibration_error(probability, y, bins=2) == 0.375


@pytest.mark.parametrize("bins", [1, 2, 15])
def test_calibration_error_at_certainty(bins):
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert expected_calibration_error(sure, torch.tensor([0, 0]), bins) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 1]), bins) == 1


def test_calibration_error_at_confidence_zero():
    """0 goes to the first bin and 1 to the last: gaps of +1 and -1 that must not meet and cancel."""
    probability, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    assert expected_calibration_error(probability, y) == 1


# %% Cosines


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(d, d, seed=seed))[0]


def simplex_etf(K: int, d: int, norm: float = 1.0) -> torch.Tensor:
    """K vectors of one length, every two at cosine -1/(K-1), turned at random in d >= K dimensions."""
    corners = (torch.eye(K, dtype=torch.float64) - 1 / K) * (K / (K - 1)) ** 0.5
    return norm * corners @ rotation(d)[:K]


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


# %% NC1: one pass over batches against two passes and an explicit pseudo-inverse


def two_passes(h, y, K: int) -> tuple[float, int]:
    """NC1 and the rank of Sigma_B as written down: NumPy, float64, all features at once."""
    h, y = np.asarray(h, dtype=np.float64), np.asarray(y)
    mu = np.stack([h[y == k].mean(0) for k in range(K)])
    within = h - mu[y]
    sigma_W = within.T @ within / len(h)
    centred = mu - mu.mean(0)
    sigma_B = centred.T @ centred / K
    pinv = np.linalg.pinv(sigma_B, rcond=1e-10, hermitian=True)
    return np.trace(sigma_W @ pinv) / K, np.linalg.matrix_rank(sigma_B, tol=1e-10 * np.abs(sigma_B).max())


def one_pass(h, y, K: int, batch_size: int = 64, order=None) -> CollapseStatistics:
    statistics = CollapseStatistics(K, h.shape[1])
    order = torch.arange(len(h)) if order is None else order
    for part in order.split(batch_size):
        statistics.update(h[part], y[part])
    return statistics


def features(sizes: list[int], d: int, spread: float = 1.0, shift: float = 0.0, seed: int = 0):
    """Features of class means ~ N(0, 1) around `shift` with residuals ~ spread N(0, 1), and their labels."""
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return shift + random(len(sizes), d, seed=seed)[y] + spread * random(len(y), d, seed=seed + 1), y


CASES = {
    "balanced": ([20] * 5, 8),
    "long tail": ([100, 30, 10, 3, 2], 8),  # mu_G is the mean of means, Sigma_W is pooled over samples
    "more classes than dimensions": ([9] * 50, 16),
    "two classes": ([5, 30], 4),
    "classes of one sample": ([1, 40, 1, 40], 6),
    "one dimension": ([4, 5, 6], 1),
}


@pytest.mark.parametrize("sizes, d", CASES.values(), ids=CASES.keys())
def test_one_pass_is_two_passes(sizes, d):
    h, y = features(sizes, d)
    K = len(sizes)
    statistics = one_pass(h, y, K, 7, torch.randperm(len(h), generator=torch.Generator().manual_seed(3)))
    expected, rank = two_passes(h, y, K)
    nc1, kept = statistics.nc1()
    assert nc1 == pytest.approx(expected, rel=1e-9)
    assert kept == rank == min(K - 1, d)
    mu = torch.stack([h[y == k].mean(0) for k in range(K)])
    torch.testing.assert_close(statistics.mean, mu)
    torch.testing.assert_close(statistics.centred_means(), mu - mu.mean(0))
    assert statistics.count.tolist() == sizes
    torch.testing.assert_close(statistics.scatter, (h - mu[y]).T @ (h - mu[y]))


@given(
    seed=st.integers(0, 99),
    batch_size=st.integers(1, 70),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_nc1_does_not_see_batches_rotation_scale_or_translation(seed, batch_size, scale, shift):
    h, y = features([20, 12, 7, 4, 1], 6, seed=seed)
    expected, rank = one_pass(h, y, 5, len(h)).nc1()
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))
    nc1, kept = one_pass(scale * h @ rotation(6, seed) + shift, y, 5, batch_size, order).nc1()
    assert nc1 == pytest.approx(expected, rel=1e-6)
    assert kept == rank == 4


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_that_lack_classes(batch_size):
    h, y = features([6, 6, 6], 5)  # class after class: most batches hold a single class
    assert one_pass(h, y, 3, batch_size).nc1()[0] == pytest.approx(two_passes(h, y, 3)[0], rel=1e-9)


@pytest.mark.parametrize("K, d, r, sigma", [(10, 32, 3.0, 0.2), (4, 4, 0.5, 2.0), (100, 128, 10.0, 1e-3)])
def test_nc1_of_an_exact_etf(K, d, r, sigma):
    """ETF means of norm r and residuals +-sigma sqrt(d) e_j, whose covariance is exactly sigma^2 I:
    Sigma_B = r^2/(K-1) times a projection of rank K - 1, so NC1 = sigma^2 (K-1)^2 / (K r^2)."""
    axes = sigma * d**0.5 * torch.eye(d, dtype=torch.float64)
    residuals = torch.cat([axes, -axes])
    h = (simplex_etf(K, d, r)[:, None] + residuals).flatten(0, 1)
    y = torch.arange(K).repeat_interleave(2 * d)
    nc1, rank = one_pass(h, y, K, 100).nc1()
    assert nc1 == pytest.approx(sigma**2 * (K - 1) ** 2 / (K * r**2), rel=1e-9, abs=0)
    assert rank == K - 1
    if (K, d) == (10, 32):
        assert nc1 == pytest.approx(0.036, rel=1e-9)


def naive_nc1(h: torch.Tensor, y: torch.Tensor, K: int) -> float:
    """With Sigma_W from sum h h^T - sum n_k mu mu^T: the form that cancels."""
    M = torch.stack([h[y == k].mean(0) for k in range(K)])
    scatter = h.T @ h - (M.T * torch.bincount(y).to(h.dtype)) @ M
    M = M - M.mean(0)
    return float((scatter / len(h) @ torch.linalg.pinv(M.T @ M / K)).trace() / K)


@pytest.mark.parametrize("shift", [5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_spread_far_from_the_origin(shift, dtype):
    h, y = features([50] * 10, 128, spread=1e-7, shift=shift)
    h = h.to(dtype)  # float32 rounds the spread to its grid; what is left there is the truth to be found
    expected, _ = two_passes(h, y, 10)
    nc1, rank = one_pass(h, y, 10, 37).nc1()
    assert nc1 > 0 and rank == 9
    assert nc1 == pytest.approx(expected, rel=0.01, abs=0)
    assert naive_nc1(h, y, 10) != pytest.approx(expected, rel=0.01, abs=0)  # this input is hard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_low_precision_are_added_up_in_float64(dtype):
    h, y = features([30] * 4, 8, shift=3)
    h = h.to(dtype)
    statistics = one_pass(h, y, 4, 11)
    assert statistics.nc1()[0] == pytest.approx(two_passes(h.double(), y, 4)[0], rel=1e-9)


def test_features_are_not_followed_by_autograd_nor_kept():
    h, y = features([3, 3], 4)
    h.requires_grad_()
    statistics = one_pass(h, y, 2)
    before = statistics.mean.clone()
    assert not statistics.scatter.requires_grad
    with torch.no_grad():
        h.zero_()
    assert statistics.mean.equal(before)


def test_two_class_means_that_coincide():
    """The rank is one short and the value is the pseudo-inverse's, not a division by rounding."""
    h, y = features([40] * 6, 8, shift=1)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    h = torch.where((y == 5)[:, None], h - mu[5] + mu[4], h)
    nc1, rank = one_pass(h, y, 6, 13).nc1()
    expected, _ = two_passes(h, y, 6)
    assert rank == 4
    assert nc1 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gap", [1e-2, 1e-5])
def test_two_class_means_that_nearly_coincide_are_not_cut_off(gap):
    """Minority collapse before it is complete: a cut-off of float32's size would drop this direction."""
    h, y = features([40] * 6, 8, spread=1e-3)
    mu = torch.stack([h[y == k].mean(0) for k in range(6)])
    h = torch.where((y == 5)[:, None], h - mu[5] + mu[4] + gap * random(8, seed=9), h)
    statistics = one_pass(h, y, 6, 13)
    means = statistics.centred_means().numpy() / 6**0.5
    sigma_W = statistics.scatter.numpy() / len(h)
    # pinv(A^T A) = pinv(A) pinv(A)^T: without squaring the small singular value
    expected = np.trace(sigma_W @ np.linalg.pinv(means, rcond=1e-9) @ np.linalg.pinv(means, rcond=1e-9).T) / 6
    nc1, rank = statistics.nc1()
    assert rank == 5
    assert nc1 == pytest.approx(expected, rel=1e-3, abs=0)


@pytest.mark.parametrize("shift", [0.0, 0.1, 5.0, 1e4])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_no_class_mean_differs(shift, batch_size):
    """Every class has the same samples: only rounding is between them, and nothing may be divided by it."""
    h, y = shift + random(20, 32).repeat(10, 1), torch.arange(10).repeat_interleave(20)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    nc1, rank = one_pass(h, y, 10, batch_size, order).nc1()
    assert math.isnan(nc1) and rank == 0


def test_all_features_zero():
    nc1, rank = one_pass(torch.zeros(6, 4), torch.tensor([0, 1, 2] * 2), 3).nc1()
    assert math.isnan(nc1) and rank == 0


def test_complete_collapse_is_zero():
    """One sample a class, or many that are equal: no spread within."""
    for sizes in [1] * 4, [9, 1, 5, 2]:
        h, y = features(sizes, 6, spread=0, shift=2)
        nc1, rank = one_pass(h, y, 4, 3).nc1()
        assert 0 <= nc1 < 1e-25 and rank == 3


def test_class_without_a_sample():
    statistics = one_pass(random(4, 3), torch.tensor([0, 0, 1, 3]), 4)
    for ask in statistics.nc1, statistics.centred_means:
        with pytest.raises(ValueError, match="class 2 "):
            ask()


# %% NC2, NC3, NC4


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
    """Over more samples than are added up at once; M is centred for NC2, NC3 and the cosines, not for NC4."""
    sizes = [6000, 2500, 400, 100]
    h, y = features(sizes, 6, shift=2)
    h, W = h.float(), random(4, 6, seed=5).float()
    prediction = (h @ W.T).argmax(1)
    few = torch.tensor([2, 3])
    measured = collapse_metrics(h, y, W, prediction, few)
    mu = torch.stack([h[y == k].double().mean(0) for k in range(4)])
    M = mu - mu.mean(0)
    nc1, rank = two_passes(h, y, 4)
    expected = {
        "nc1": nc1,
        "nc1_rank": rank,
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
