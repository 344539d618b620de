"""Task splits and the accuracy matrix of common.py against hand-worked examples and plain loops."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import average_so_far, split_tasks, stream_metrics, task_accuracies

# %% Which class comes when


def test_classes_in_label_order():
    assert split_tasks(10, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert split_tasks(3, 1).tolist() == [0, 0, 0]
    assert split_tasks(3, 3).tolist() == [0, 1, 2]


@given(K=st.integers(1, 30), tasks=st.integers(1, 30))
def test_every_task_gets_classes_and_none_many_more(K, tasks):
    if tasks > K:
        return
    task = split_tasks(K, tasks)
    sizes = torch.bincount(task, minlength=tasks)
    assert task.shape == (K,) and len(sizes) == tasks and task.equal(task.sort().values)
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("tasks", [0, -1, 4])
def test_more_tasks_than_classes(tasks, user_error):
    with user_error(f"--tasks {tasks}", "1 to 3"):
        split_tasks(3, tasks)


# %% Accuracies and their summary


def test_class_il_and_task_il_by_hand():
    task = torch.tensor([0, 1, 0, 1])  # classes 0 and 2 are task 0
    y = torch.tensor([0, 2, 2, 1, 3])
    z = torch.tensor([
        [4.0, 9.0, 3.0, 0.0],  # class 1 wins, but 0 wins within its task
        [1.0, 0.0, 5.0, 0.0],  # right
        [6.0, 0.0, 5.0, 0.0],  # wrong either way
        [0.0, 1.0, 0.0, 2.0],  # wrong either way
        [9.0, 0.0, 0.0, 1.0],  # class 0 wins, but 3 wins within its task
    ])  # fmt: skip
    class_il, task_il = task_accuracies(z, y, task)
    np.testing.assert_allclose(class_il, [1 / 3, 0])
    np.testing.assert_allclose(task_il, [2 / 3, 1 / 2])


def test_a_task_without_test_images_is_nan():
    class_il, task_il = task_accuracies(torch.eye(4)[:2], torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
    assert class_il[0] == task_il[0] == 1 and class_il[1].isnan() and task_il[1].isnan()


@given(st.integers(0, 50))
def test_task_il_is_never_below_class_il(seed):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(40, 6, generator=generator), torch.randint(6, (40,), generator=generator)
    y[:3] = torch.arange(0, 6, 2)
    task = split_tasks(6, 3)
    class_il, task_il = task_accuracies(z, y, task)
    assert (task_il >= class_il).all()
    for t in range(3):  # the definition, image by image
        members = [n for n in range(40) if task[y[n]] == t]
        own = [k for k in range(6) if task[k] == t]
        right = sum(max(own, key=lambda k, n=n: float(z[n, k])) == int(y[n]) for n in members)
        assert math.isclose(float(task_il[t]), right / len(members))


def test_summary_by_hand():
    R = torch.tensor([[0.9, 0.1, 0.0], [0.95, 0.8, 0.2], [0.5, 0.85, 0.7]])
    summary = stream_metrics(R)
    assert summary["average"] == pytest.approx((0.5 + 0.85 + 0.7) / 3)
    assert summary["stream_average"] == pytest.approx((0.9 + (0.95 + 0.8) / 2 + (0.5 + 0.85 + 0.7) / 3) / 3)
    # task 0: best before the end 0.95, at the end 0.5; task 1: best 0.8, then 0.85: it gained
    assert summary["forgetting"] == pytest.approx((0.45 - 0.05) / 2)
    assert summary["backward_transfer"] == pytest.approx((-0.4 + 0.05) / 2)
    assert average_so_far(R).tolist() == pytest.approx([0.9, 0.875, 2.05 / 3])


def test_what_is_not_defined_is_nan():
    joint = stream_metrics(torch.tensor([[0.5, 0.7]]))
    assert joint["average"] == pytest.approx(0.6)
    assert all(math.isnan(joint[key]) for key in ("forgetting", "backward_transfer", "stream_average"))
    single = stream_metrics(torch.tensor([[0.5]]))
    assert single["average"] == single["stream_average"] == 0.5 and math.isnan(single["forgetting"])


def test_a_task_without_test_images_is_left_out():
    nan = float("nan")
    R = torch.tensor([[0.9, nan, 0.0], [0.8, nan, 0.0], [0.6, nan, 0.7]])
    summary = stream_metrics(R)
    assert summary["average"] == pytest.approx(0.65)
    assert summary["forgetting"] == pytest.approx(0.3) and summary["backward_transfer"] == pytest.approx(-0.3)


# %% Their table


def test_the_table_of_a_stream(tmp_path):
    path = Path(__file__).resolve().parent.parent / "results" / "collect.py"
    spec = importlib.util.spec_from_file_location("collect_streams", path)
    spec.loader.exec_module(collect := importlib.util.module_from_spec(spec))
    for seed, class_il in ((0, 0.30), (1, 0.32)):
        (folder := tmp_path / str(seed)).mkdir()
        config = {
            "flags": {"method": "er", "mask": True, "seed": seed},
            "commit": "0" * 40,
            "hardware": "abacus",
        }
        result = {"method": "er", "class_il": class_il, "task_il": 0.9, "forgetting": 0.1, "seconds": 60}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(result))
    lines = collect.main([str(tmp_path)]).splitlines()
    assert lines[0] == "| method | seeds | class-IL % | task-IL % | forgetting % |"
    assert lines[2] == "| `er` | 2 | 31.00 ± 1.41 | 90.00 ± 0.00 | 10.00 ± 0.00 |"
    assert not any("Groups" in line for line in lines)  # those of the long-tailed tables
