"""zero_mean_metrics of common.py: exact configurations, loops over pairs, false success."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import equiangularity, self_duality, zero_mean_metrics

KEYS = ["znc_equinorm", "znc_mean_cosine", "znc_max_cosine", "znc_alignment"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(K: int, size: int) -> torch.Tensor:
    """A non-negative orthogonal classifier: class k owns `size` dimensions, (K, K * size), unit rows."""
    return torch.eye(K, dtype=torch.float64).repeat_interleave(size, 1) / size**0.5


@pytest.mark.parametrize("K, size", [(2, 1), (10, 6), (100, 2)])
def test_all_are_zero_at_zero_mean_collapse(K, size):
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


def test_against_a_loop_over_pairs():
    M, W = random(6, 4).numpy(), random(6, 4, seed=1).numpy()
    norms = [math.sqrt(sum(x * x for x in row)) for row in M]
    pairs = [abs(float(M[i] @ M[j])) / norms[i] / norms[j] for i in range(6) for j in range(i)]
    mean = sum(norms) / 6
    expected = {
        "znc_equinorm": math.sqrt(sum((n - mean) ** 2 for n in norms) / 6) / mean,
        "znc_mean_cosine": sum(pairs) / 15,
        "znc_max_cosine": max(pairs),
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
def test_rotation_scale_and_class_order_do_not_matter(seed, scale, K):
    M, W = random(K, 5, seed=seed), random(K, 5, seed=seed + 1)
    R = torch.linalg.qr(random(5, 5, seed=seed + 2))[0]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    turned = zero_mean_metrics(scale * (M @ R)[order], (W @ R)[order])
    assert turned == pytest.approx(zero_mean_metrics(M, W), rel=1e-9, abs=1e-12)


def test_float32_is_measured_in_float64():
    M = (blocks(4, 3) + 1e-7 * random(4, 12)).float()
    assert zero_mean_metrics(M) == zero_mean_metrics(M.double())


def test_a_mean_at_the_origin_is_not_orthogonal_to_all():
    M = blocks(3, 2)
    M[1] = 0
    measured = zero_mean_metrics(M)
    assert math.isnan(measured["znc_mean_cosine"]) and math.isnan(measured["znc_max_cosine"])
    with pytest.raises(ValueError, match="1 class"):
        zero_mean_metrics(M[:1])
