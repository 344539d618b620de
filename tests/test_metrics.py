"""Accuracy, class sizes, heads and streams of common.py: loops, worked cases, invariants."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common

# %% Classes by size


def shot_groups(counts, profile=""):
    groups = common.shot_groups(torch.tensor(counts), profile)
    assert list(groups) == ["many", "medium", "few"]
    return [classes.tolist() for classes in groups.values()]


@pytest.mark.parametrize("counts, profile, expected", [
    ([19, 500, 101, 100, 20, 1], "", [[1, 2], [3, 4], [0, 5]]),  # the bounds themselves are medium
    ([500, 101, 100, 20], "", [[0, 1], [2], [3]]),  # by the published rule none would be few
    ([1, 2, 3, 4, 5, 6, 7], "exp", [[4, 5, 6], [2, 3], [0, 1]]),
    ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], "", [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ([40, 25, 15, 8, 5, 1, 1, 1, 1, 1], "", [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9]]),
    ([9, 9, 9, 9, 9, 1], "", [[0, 1, 2, 3, 4], [], [5]]),  # the largest are many, the smallest few
    ([7, 7, 7], "exp", [[0, 1, 2], [], []]),  # one size: nothing is rare
    ([5000, 50, 4900, 49], "step", [[0, 2], [], [1, 3]]),  # the small ones have 50, and are the few
    ([8, 3, 2, 1], "step", [[0, 1], [], [2, 3]]),  # cut at the geometric mean, 2.8; the mean is 4.5
])  # fmt: skip
def test_shot_groups(counts, profile, expected):
    assert shot_groups(counts, profile) == expected


@given(
    counts=st.lists(st.sampled_from([1, 2, 7, 19, 20, 50, 100, 101, 200]), min_size=2, max_size=12),
    profile=st.sampled_from(["", "exp", "step"]),
    seed=st.integers(0, 99),
)
def test_groups_part_no_size_and_do_not_depend_on_the_numbering(counts, profile, seed):
    groups = shot_groups(counts, profile)
    assert sorted(itertools.chain(*groups)) == list(range(len(counts)))
    many, medium, few = ([counts[k] for k in group] for group in groups)
    assert many and bool(few) == (len(set(counts)) > 1)
    assert min(many) > max(medium + few, default=0)
    assert min(many + medium) > max(few, default=0)
    order = np.random.default_rng(seed).permutation(len(counts)).tolist()
    renumbered = shot_groups([counts[k] for k in order], profile)
    assert [sorted(order[i] for i in group) for group in renumbered] == groups


def test_accuracies_of_groups_are_means_over_classes():
    y = torch.tensor([0, 0, 0, 0, 1, 2])
    z = torch.eye(4)[[0, 0, 0, 1, 1, 0]]  # classes 0, 1, 2 right in 3/4, 1, 0; class 3 has no sample
    groups = {"many": torch.tensor([0, 1]), "medium": torch.tensor([], dtype=torch.long)}
    found = common.accuracies(z, y, groups | {"few": torch.tensor([2, 3])})
    assert list(found) == ["accuracy", "many", "medium", "few", "per_class"]
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["many"] == pytest.approx(7 / 8) and math.isnan(found["medium"]) and found["few"] == 0
    np.testing.assert_array_equal(found["per_class"], [3 / 4, 1, 0, math.nan])


# %% Heads


def test_heads_are_the_loop_over_samples():
    """The published heads, one sample at a time; n_k from 150 down to 4."""
    generator = torch.Generator().manual_seed(0)
    sizes = [150, 60, 30, 12, 4]
    K, d = 5, 3
    means = torch.randn(K, d, generator=generator)
    train_y = torch.repeat_interleave(torch.arange(K), torch.tensor(sizes))
    test_y = torch.arange(K).repeat_interleave(40)
    train_h = means[train_y] + 2 * torch.randn(len(train_y), d, generator=generator)
    test_h = means[test_y] + torch.randn(len(test_y), d, generator=generator)
    lengths = torch.tensor([[3.0], [2.0], [1.5], [1.0], [0.5]])
    W = lengths * (means + 0.3 * torch.randn(K, d, generator=generator))
    b = torch.randn(K, generator=generator)
    features = (train_h, train_y, test_h, test_y)
    found = common.heads(*features, W, b)
    mu = np.stack([train_h[train_y == k].numpy().mean(0) for k in range(K)])
    right = {name: [] for name in common.HEADS}
    for x, k in zip(test_h.double().numpy(), test_y.tolist(), strict=True):
        z = [float(x @ W[j].double().numpy()) for j in range(K)]
        own = [z[j] + float(b[j]) for j in range(K)]
        scores = {
            "own": own,
            "logit_adjustment": [own[j] - math.log(sizes[j]) for j in range(K)],
            "tau_normalisation": [z[j] / float(W[j].double().norm()) for j in range(K)],
            "nearest_mean": [-float(np.linalg.norm(x - mu[j])) for j in range(K)],
        }
        for name, score in scores.items():
            right[name].append(score.index(max(score)) == k)
    expected = {name: np.mean(of_samples) for name, of_samples in right.items()}
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(found) == list(common.HEADS)
    assert len(set(found.values())) == 4  # the heads differ on this input
    cosine = common.heads(*features, W, b, softmax=False)
    assert cosine == pytest.approx({**found, "logit_adjustment": math.nan}, nan_ok=True)
    plain = common.heads(*features, W)  # without biases
    assert plain["own"] == np.mean((test_h @ W.T).argmax(1).numpy() == test_y.numpy()) != found["own"]
    h, y = torch.eye(3), torch.arange(3)  # a class without test samples
    assert set(common.heads(h, y, h[:2], y[:2], torch.eye(3)).values()) == {1.0}


# %% Streams of tasks


def test_tasks_of_classes(user_error):
    assert common.split_tasks(10, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for tasks in (0, 4):
        with user_error(f"--tasks {tasks}", "1 to 3"):
            common.split_tasks(3, tasks)


@given(st.integers(0, 50))
def test_class_il_and_task_il_are_loops_over_images(seed):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(40, 8, generator=generator), torch.randint(6, (40,), generator=generator)
    y[:3] = torch.tensor([0, 1, 4])
    task = torch.tensor([0, 1, 0, 1, 2, 2, 3, 3])  # no image is of the last task
    for found, allowed in zip(common.task_accuracies(z, y, task), (lambda *_: True, int.__eq__), strict=True):
        for t in range(3):
            images = [n for n in range(40) if task[y[n]] == t]
            classes = [k for k in range(8) if allowed(int(task[k]), t)]
            right = sum(max(classes, key=lambda k, n=n: float(z[n, k])) == int(y[n]) for n in images)
            assert math.isclose(float(found[t]), right / len(images))
        assert found[3].isnan()


def test_stream_metrics_by_hand():
    R = torch.tensor([[0.9, 0.9, 0.0], [0.95, 0.8, 0.2], [0.5, 0.85, 0.7]])
    summary = common.stream_metrics(R)
    assert summary == pytest.approx({
        "average": (0.5 + 0.85 + 0.7) / 3,
        # task 0: best before the end 0.95, at the end 0.5; task 1, once learned: 0.8, then 0.85
        "forgetting": (0.45 - 0.05) / 2,
    })  # fmt: skip
    R[:, 1] = math.nan  # a task without test images is left out
    summary = common.stream_metrics(R)
    assert summary["average"] == pytest.approx(0.6)
    assert summary["forgetting"] == pytest.approx(0.45)
    for joint, average in ([0.5, 0.7], 0.6), ([0.5], 0.5):  # a joint run, or a single task
        summary = common.stream_metrics(torch.tensor([joint]))
        assert summary.pop("average") == pytest.approx(average) and all(map(math.isnan, summary.values()))
