"""Accuracy, class sizes, calibration, heads of common.py against plain loops and worked-out cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import accuracy_per_class, expected_calibration_error, heads, shot_groups


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
        ([7], [[0], [], []]),
    ],
)
def test_shot_groups_in_thirds_where_the_rule_finds_no_many_or_no_few(counts, expected):
    groups, rule = shot_groups(torch.tensor(counts))
    assert members(groups) == expected
    assert "thirds" in rule


@pytest.mark.parametrize(
    "counts", [[143, 1, 142, 1], [5000, 50, 5000, 50], [30, 4, 30, 4], [143, 28, 142, 29]]
)
def test_a_step_has_no_medium_classes_and_all_of_its_rare_ones_are_few(counts):
    groups, rule = shot_groups(torch.tensor(counts))
    assert members(groups) == [[0, 2], [], [1, 3]]
    assert "thirds" not in rule


@given(counts=st.lists(st.integers(1, 200), min_size=3, max_size=12))
def test_every_class_is_in_one_shot_group_and_none_outranks_a_larger_one(counts):
    many, medium, few = members(shot_groups(torch.tensor(counts))[0])
    assert sorted(many + medium + few) == list(range(len(counts)))
    assert many and few
    size = counts.__getitem__
    assert min(map(size, many)) >= max(map(size, medium + few))
    assert min(map(size, many + medium)) >= max(map(size, few))


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


# %% Heads


def test_heads_are_the_loop_over_samples():
    """The published snippet's four heads, one sample at a time; n_k from 150 down to 4."""
    generator = torch.Generator().manual_seed(0)
    sizes = [150, 60, 30, 12, 4]
    K, d = 5, 3
    means = torch.randn(K, d, generator=generator)
    train_y = torch.repeat_interleave(torch.arange(K), torch.tensor(sizes))
    test_y = torch.arange(K).repeat_interleave(40)
    train_h = means[train_y] + torch.randn(len(train_y), d, generator=generator)
    test_h = means[test_y] + torch.randn(len(test_y), d, generator=generator)
    lengths = torch.tensor([[3.0], [2.0], [1.5], [1.0], [0.5]])
    W = lengths * (means + 0.3 * torch.randn(K, d, generator=generator))
    b = torch.randn(K, generator=generator)
    found = heads(train_h, train_y, test_h, test_y, W, b)
    mu = np.stack([train_h[train_y == k].numpy().mean(0) for k in range(K)])
    right = {name: [] for name in ("own", "equal_length", "minus_log_n", "nearest_mean")}
    for x, k in zip(test_h.double().numpy(), test_y.tolist(), strict=True):
        z = [float(x @ W[j].double().numpy()) for j in range(K)]
        own = [z[j] + float(b[j]) for j in range(K)]
        scores = {
            "own": own,
            "equal_length": [z[j] / float(W[j].double().norm()) for j in range(K)],
            "minus_log_n": [own[j] - math.log(sizes[j]) for j in range(K)],
            "nearest_mean": [-float(np.linalg.norm(x - mu[j])) for j in range(K)],
        }
        for name, score in scores.items():
            right[name].append(score.index(max(score)) == k)
    expected = {}
    for name, of_samples in right.items():
        expected[name] = np.mean(of_samples)
        expected[f"{name}_few"] = np.mean(of_samples[-80:])  # the classes of 12 and 4 images
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(found) == list(expected)
    assert len({found[name] for name in right}) == 4  # the heads differ on this input


def test_heads_do_without_biases():
    h, y = torch.eye(3), torch.arange(3)
    assert heads(h, y, h, y, torch.eye(3))["own"] == 1
    with pytest.raises(ValueError, match="class 2 has no sample"):
        heads(h[:2], y[:2], h, y, torch.eye(3))
