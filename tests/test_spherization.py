"""spherization.py: the layer against its definition, the tasks' parts, the program as a user meets it."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import spherization as script
from common import SUPERCLASSES, UserError, load_dataset
from spherization import Spherization, spherize

ROOT = Path(script.__file__).resolve().parent
found = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "spherization.py")
benchmark = importlib.util.module_from_spec(found)
found.loader.exec_module(benchmark)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% The layer


def definition(z, s, r, delta=1e-6):
    """Coordinate by coordinate: x_k = r cos(phi_k) prod_{j<k} sin(phi_j), in float64, differentiable."""
    n = z.shape[1]
    phi_L = math.asin(delta ** (1 / n))
    phi = (math.pi / 2 - phi_L) * torch.sigmoid(s * z) + phi_L
    columns = []
    for k in range(n + 1):
        x = r * (phi[:, k].cos() if k < n else torch.ones(len(z), dtype=z.dtype))
        for j in range(min(k, n)):
            x = x * phi[:, j].sin()
        columns.append(x)
    return torch.stack(columns, 1), phi


@pytest.mark.parametrize("n", [1, 2, 3, 20, 39, 40, 45])  # from 40 on sines are taken from cosines
def test_values_and_gradients_are_the_definitions(n):
    z = 0.3 * torch.randn(6, n, dtype=torch.float64, generator=generator())
    g = torch.randn(6, n + 1, dtype=torch.float64, generator=generator(1))
    layer = Spherization(n, radius=2.0, scale=3.0).double()
    ours = z.clone().requires_grad_()
    theirs = z.clone().requires_grad_()
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = layer(ours)
    expected, phi = definition(theirs, s, 2.0)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(script.angles(x.detach()), phi.detach(), rtol=1e-9, atol=1e-12)
    (x * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.s.grad, s.grad, rtol=1e-9, atol=1e-12)


@given(
    n=st.sampled_from([1, 2, 7, 39, 40, 64, 500, 4096]),
    radius=st.sampled_from([1.0, 5.0, 64.0]),
    delta=st.sampled_from([1e-6, 1e-3, 0.5]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),  # 0: all angles alike, rounding errors would add up
    shift=st.floats(-3, 3),
    seed=st.integers(0, 20),
)
def test_in_float32_it_is_a_sphere(n, radius, delta, spread, shift, seed):
    z = shift + spread * torch.randn(4, n, generator=generator(seed))
    x = Spherization(n, radius, 5.0, delta)(z).detach()
    assert x.shape == (4, n + 1) and x.dtype == torch.float32
    assert (x >= 0).all()
    assert (x.double().norm(dim=1) / radius - 1).abs().max() < 2e-6
    phi_L = script.lower_bound(n, delta)
    phi = phi_L + (math.pi / 2 - phi_L) * torch.sigmoid(5 * z.double())
    assert (script.angles(x) - phi).abs().max() < 1e-5
    assert x[:, -1].min() >= radius * delta * (1 - 1e-5)  # the last coordinate is the product of all sines


def test_images_are_spherized_pixel_by_pixel():
    z = torch.randn(2, 5, 3, 4, generator=generator())
    layer = Spherization(5)
    x = layer(z)
    assert x.shape == (2, 6, 3, 4)
    torch.testing.assert_close(x.norm(dim=1), torch.full((2, 3, 4), 5.0))
    torch.testing.assert_close(x[1, :, 2, 3], layer(z[1:, :, 2, 3])[0])


def test_bf16_is_computed_in_float32():
    layer = Spherization(4096)
    z = torch.randn(8, 4096, generator=generator())
    assert torch.equal(layer(z.bfloat16()), layer(z.bfloat16().float()))
    linear = torch.nn.Linear(10, 4096)
    with torch.autocast("cpu", torch.bfloat16):
        pre = linear(torch.randn(8, 10, generator=generator()))
        x = layer(pre)
    assert pre.dtype == torch.bfloat16 and x.dtype == torch.float32
    assert (x.double().norm(dim=1) / 5 - 1).abs().max() < 1e-6
    x.sum().backward()
    assert linear.weight.grad.isfinite().all() and linear.weight.grad.abs().max() > 0


def test_nothing_of_size_n_squared_is_kept():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    layer = Spherization(4096)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 4096, requires_grad=True)).sum()
    assert sum(sizes) < 16 * 2 * 4097
    assert sum(t.numel() for t in layer.state_dict().values()) == 1
    assert layer.s.requires_grad


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"radius": 0.0}, {"scale": math.nan}, {"delta": 1.0}, {"delta": 1e-40}]
)
def test_bad_layers(wrong):
    with pytest.raises(ValueError, match="Spherization"):
        Spherization(**{"n": 3, **wrong})


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 4)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"expected \(B, n\)"):
        Spherization(3)(torch.zeros(shape))


@pytest.mark.parametrize("n", [2, 30, 64])
def test_the_released_matrix_form_is_the_same_map(n):
    z = torch.randn(5, n, generator=generator())
    released = benchmark.MatrixForm(n)
    assert (released(z) - Spherization(n)(z)).abs().max() < 2e-4  # its epsilons
    # its matrices as the formula says, entry by entry
    for i in range(n + 1):
        for j in range(n + 1):
            assert released.W_phi[i, j] == float(i < j and (i, j) != (n - 1, n))
            if i < n:
                assert released.W_theta[i, j] == float(i == j or (i, j) == (n - 1, n))


# %% Parts of the tasks


@pytest.mark.parametrize("theta", [0.1, 1.0, math.pi / 2, 2.5])
def test_angle_operators(theta):
    cos = torch.tensor(math.cos(theta), dtype=torch.float64)
    k = 0.3
    e = math.exp(-math.pi / (2 * k))
    u = math.exp(theta / k - math.pi / (2 * k))
    expected = {
        "cosine": math.cos(theta),
        "linear": 1 - 2 * theta / math.pi,
        "sigmoid": (1 + e) / (1 - e) * (1 - u) / (1 + u),
    }
    for name, value in expected.items():
        assert script.angle_operator(name, cos).item() == pytest.approx(value, abs=1e-9)
        ends = torch.tensor([1.0, -1.0], requires_grad=True)
        g = script.angle_operator(name, ends)
        assert g.tolist() == pytest.approx([1, -1], abs=2e-3)
        (grad,) = torch.autograd.grad(g.sum(), ends)
        assert grad.isfinite().all()
    with pytest.raises(ValueError, match="angle_operator"):
        script.angle_operator("sigmoids", cos)


@pytest.mark.parametrize(
    "kind", ["inner", "inner+bias", "cosine", "linear", "sigmoid", "w-cosine", "w-linear"]
)
def test_classifiers(kind):
    h = torch.randn(6, 4, generator=generator())
    classifier = script.Classifier(kind, 4, 3)
    z = classifier(h)
    W = classifier.weight
    cos = F.cosine_similarity(h[:, None], W[None], dim=2)
    if kind in ("inner", "inner+bias"):
        expected = h @ W.T + (classifier.bias if kind == "inner+bias" else 0)
    else:
        expected = script.angle_operator(kind.removeprefix("w-"), cos)
        if kind.startswith("w-"):
            expected = h.norm(dim=1, keepdim=True) * expected
    torch.testing.assert_close(z, expected)
    assert (classifier.bias is None) == (kind != "inner+bias")
    # what features.npz holds reproduces the decisions
    saved = h @ classifier.class_vectors().T + (0 if classifier.bias is None else classifier.bias)
    assert torch.equal(saved.argmax(1), z.argmax(1))


def test_every_method_can_be_built():
    data = load_dataset("digits")
    for task in ("retain", "overlap", "fewshot"):
        row = script.TASKS[task]
        args = script.parse(["--task", task])
        for name in row.methods:
            model = row.build(args, name, data)
            h = model["layer"](model["trunk"](torch.randn(3, 1, 8, 8, generator=generator())))
            if "sphere" in name:
                torch.testing.assert_close(h.norm(dim=1), torch.full((3,), 5.0))
            if "classifier" in model:
                assert model["classifier"](h).shape == (3, 10)


@given(seed=st.integers(0, 30), gap=st.sampled_from([0.05, 0.5]))
def test_overlap_against_two_loops(seed, gap):
    g = generator(seed)
    h = torch.randn(9, 3, generator=g)
    y = torch.randint(3, (9,), generator=g)
    h[0] = 0  # an all-dead ReLU layer has no direction: cosine 0
    near, hidden = script.overlap(h, y, gap)
    for i in range(9):
        close, apart = -1.0, -1.0
        for j in range(9):
            if y[i] != y[j]:
                a, b = h[i].double(), h[j].double()
                cos = float(a @ b / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0
                close = max(close, cos)
                low, high = sorted([float(a.norm()), float(b.norm())])
                if high > (1 + gap) * low:
                    apart = max(apart, cos)
        assert near[i].item() == pytest.approx(close, abs=1e-12)
        assert hidden[i].item() == pytest.approx(apart, abs=1e-12)


def test_overlap_is_what_the_norm_kept_apart():
    h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.02, 2.0]])
    near, hidden = script.overlap(h, torch.tensor([0, 1, 0, 1]), 0.1)
    assert near[:2].tolist() == [1, 1] and hidden[:2].tolist() == [1, 1]
    assert (1 - near[2:] < 1e-4).all() and (hidden[2:] < 0.5).all()  # the same norm: nothing is hidden
    sphere = spherize(torch.randn(20, 3, generator=generator()), 5.0)
    assert (script.overlap(sphere, torch.arange(20) % 2, 1e-3)[1] == -1).all()  # one norm: never


def test_episodes():
    y = torch.tensor([3] * 10 + [7] * 8 + [9] * 9)
    episodes = script.draw_episodes(y, 30, 2, 8, generator())
    assert episodes.shape == (30, 2, 8)
    seen = set()
    for episode in episodes:
        labels = [set(y[row].tolist()) for row in episode]
        assert all(len(found) == 1 for found in labels) and labels[0] != labels[1]
        assert len(set(episode.flatten().tolist())) == 16
        seen |= {tuple(sorted(labels[0] | labels[1]))}
    assert seen == {(3, 7), (3, 9), (7, 9)}


def test_prototype_logits_one_query_at_a_time():
    h = torch.randn(2, 3, 6, 4, generator=generator(), dtype=torch.float64)
    found = {metric: script.prototype_logits(h, 2, metric) for metric in ("euclidean", "cosine")}
    for e in range(2):
        for query in range(12):
            q = h[e, query // 4, 2 + query % 4]
            for k in range(3):
                p = (h[e, k, 0] + h[e, k, 1]) / 2
                cos = q @ p / q.norm() / p.norm()
                squared = ((q - p) ** 2).sum().item()
                assert found["euclidean"][e, query, k].item() == pytest.approx(-squared / 128)
                assert found["cosine"][e, query, k].item() == pytest.approx(1000 * (cos.item() - 1) / 128)
    with pytest.raises(ValueError, match="prototype_logits"):
        script.prototype_logits(h, 2, "cosin")


def test_fc100_is_split_by_superclass():
    classes = tuple(sorted(name for members in SUPERCLASSES.values() for name in members.split()))
    data = load_dataset("digits")
    y = torch.arange(100).repeat(20)
    data = data._replace(classes=classes, train_x=y.view(-1, 1, 1, 1), train_y=y)
    data = data._replace(test_x=data.train_x[:0], test_y=y[:0])
    args = script.parse(["--task", "fewshot", "--dataset", "cifar100"])
    split = {}
    for name, (x, y) in script.split_by_class(args, data).items():
        assert torch.equal(x.flatten(), y)
        split[name] = {classes[k] for k in y.tolist()}
    assert len(split["train"]) == 60 and len(split["test"]) == 20 and not split["train"] & split["test"]
    assert {"beaver", "bee", "fox", "baby"} <= split["test"] and {"apple", "bus"} <= split["train"]
    assert not {"bear", "camel", "crab", "hamster"} & (split["train"] | split["test"])  # to validate on
    args = script.parse(["--task", "fewshot"])
    assert set(script.split_by_class(args, load_dataset("digits"))["test"][1].tolist()) == {5, 6, 7, 8, 9}


def test_networks_have_the_published_sizes():
    def count(trunk):
        with torch.device("meta"):  # shapes alone
            layers, n = trunk((28, 28, 1))
        return sum(p.numel() for layer in layers for p in layer.parameters()), n

    assert count(script.mlp) == (784 * 500 + 500 + 500 * 300 + 300, 300)
    assert count(script.lenet) == (61_706 - 85 * 10, 84)  # LeNet-5 less its last layer


def test_schedules():
    def rates(*flags, epochs):
        args = script.parse(list(flags))
        return [script.learning_rate(e, args) / args.lr for e in epochs], args

    found, args = rates("--dataset", "mnist", epochs=(0, 99))
    assert found == [1, 1] and (args.net, args.epochs, args.weight_decay) == ("mlp", 100, 5e-5)
    found, args = rates("--task", "fewshot", "--dataset", "cifar100", epochs=(9, 10, 99))
    assert found == [1, 0.5, 0.5**9] and (args.net, args.lr, args.epochs) == ("conv4", 1e-4, 100)
    found, args = rates("--dataset", "digitslt", epochs=(0, 63, 64, 79))
    assert found == [1, 1, 0.1, 0.1] and args.epochs == 80
    found, _ = rates("--dataset", "digits", "--epochs", "5", epochs=(3, 4))
    assert found == [1, 0.1]


# %% The program


def files(folder):
    """Everything that a run computes, for comparison to the last bit; times are left out."""
    result = json.loads((folder / "result.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in (result, *history):
        entry.pop("seconds")
    with np.load(folder / "features.npz", allow_pickle=False) as arrays:
        features = {key: arrays[key] for key in arrays.files}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return result, history, features, state["model"]


def assert_same_bits(one, two):
    assert json.dumps(one[:2]) == json.dumps(two[:2])
    assert one[2].keys() == two[2].keys() and one[3].keys() == two[3].keys()
    assert all(np.array_equal(one[2][key], two[2][key]) for key in one[2])
    assert all(torch.equal(one[3][key], two[3][key]) for key in one[3])


SHORT = ["--method", "sphere", "--epochs", "3", "--batch-size", "300", "--precision", "fp32"]
SHORT += ["--device", "cpu"]
FOLDER = Path("spherization") / "retain" / "digits-mlp" / "sphere" / "seed0"
FEWSHOT = ["--task", "fewshot", "--method", "cosine+sphere", "--epochs", "2", "--episodes", "3"]
FEWSHOT += ["--test-episodes", "20", "--precision", "fp32", "--device", "cpu"]


def test_killed_and_gone_on_with_is_the_same_to_the_last_bit(tmp_path, run_until_killed, no_figures):
    """kill -9 while a checkpoint is being renamed: after an epoch that is logged but not saved."""
    script.main([*SHORT, "--out", str(tmp_path / "whole")])
    broken = [*SHORT, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "save", 1)
    run_until_killed(script.main, broken, "save", 2)
    script.main(broken)
    assert_same_bits(files(tmp_path / "whole" / FOLDER), files(tmp_path / "broken" / FOLDER))
    assert not list((tmp_path / "broken").rglob(".*"))  # the half-renamed file is gone too


def test_episodes_go_on_where_they_were(tmp_path, run_until_killed, no_figures):
    folder = Path("spherization") / "fewshot" / "digits-conv4" / "cosine+sphere" / "seed0"
    script.main([*FEWSHOT, "--out", str(tmp_path / "whole")])
    argv = [*FEWSHOT, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, argv, "save", 2)
    torch.rand(17)  # the world goes on
    script.main(argv)
    assert_same_bits(files(tmp_path / "whole" / folder), files(tmp_path / "broken" / folder))


def test_the_seed_is_all_that_differs(tmp_path, no_figures):
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*SHORT, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files((tmp_path / out / FOLDER).with_name(f"seed{seed}")))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["W"], results[2][2]["W"])


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, str(ROOT / "spherization.py"), "--dry-run", "--out", str(tmp_path)]
    argv += ["--method", "sphere-3d"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "183,433 parameters" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / "spherization" / "retain" / "digits-mlp"
    written = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    assert {path.name for path in (folder / "sphere-3d" / "seed0").iterdir()} >= written
    for name in ("training", "octant"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"\n  {name}.png" in done.stdout  # with its caption


def test_overlap_in_words_and_pictures(tmp_path, capsys):
    argv = ["--task", "overlap", "--method", "sphere", "--dry-run", "--out", str(tmp_path)]
    done = script.main(argv)
    printed = capsys.readouterr().out
    assert (Path(done["folder"]) / "overlap.png").read_bytes().startswith(b"\x89PNG")
    sphere = done["results"][-1]
    assert sphere["hidden_counts"] == [0] * len(script.TAUS)
    assert all(sorted(r["near_counts"]) == r["near_counts"] for r in done["results"])
    for word in ("near wrong: ", "hidden: ", "\nsphere: ", "\n  overlap.png"):
        assert word in printed


def test_few_shots_in_words_and_pictures(tmp_path, capsys):
    argv = ["--task", "fewshot", "--method", "cosine+sphere", "--dry-run"]
    done = script.main([*argv, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (Path(done["folder"]) / "fewshot.png").read_bytes().startswith(b"\x89PNG")
    for word in ("1-shot: ", "\ncosine+sphere: ", "\n  fewshot.png"):
        assert word in printed


@pytest.mark.parametrize("flags", [
    ["--task", "overlap", "--method", "w-linear", "cosine"],
    ["--task", "fewshot", "--method", "cosine", "euclidean+last"],
    ["--method", "sphere", "--precision", "bf16", "--radius", "2", "--scale", "2"],
    ["--method", "plain-3d", "--batch-size", "300", "--eval-every", "3", "--seed", "0", "1"],
    ["--dataset", "digitslt", "--method", "plain"],
])  # fmt: skip
def test_every_task_and_flag_trains(flags, tmp_path, no_figures):
    done = script.main(["--dry-run", "--out", str(tmp_path), *flags])
    for result in done["results"]:
        assert 0 <= result["accuracy"] <= 1 and 0 <= result["train_accuracy"] <= 1
        assert result["task"] == script.parse(flags).task


@pytest.mark.parametrize("task, name", [
    ("retain", "plain"), ("retain", "sphere-3d"), ("overlap", "none"), ("overlap", "w-sigmoid"),
])  # fmt: skip
def test_features_reproduce_the_decisions(task, name, tmp_path, no_figures):
    """W as the loss sees it, and b where there is one: by them the accuracy is the run's own."""
    argv = ["--task", task, "--method", name, "--epochs", "1", "--out", str(tmp_path)]
    done = script.main(argv)
    saved = np.load(Path(done["folder"]) / name / "seed0" / "features.npz")
    assert ("b" in saved) == (name == "plain")
    z = saved["test_h"].astype(float) @ saved["W"].T.astype(float)
    if "b" in saved:
        z += saved["b"]
    assert (z.argmax(1) == saved["test_y"]).mean() == pytest.approx(done["results"][0]["accuracy"], abs=1e-12)


def test_of_many_images_every_class_keeps_some(tmp_path, monkeypatch, no_figures):
    """A class of two images among a thousand is measured, and is no error by angle."""
    load = script.prepare_data

    def long_tailed(args, **options):
        data = load(args, **options)
        kept = torch.cat([(data.train_y == k).nonzero().flatten()[: 2 if k == 9 else 100] for k in range(10)])
        return data._replace(train_x=data.train_x[kept], train_y=data.train_y[kept])

    monkeypatch.setattr(script, "prepare_data", long_tailed)
    monkeypatch.setattr(script, "KEPT", 200)
    done = script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    counts = np.bincount(np.load(tmp_path / FOLDER / "features.npz")["train_y"], minlength=10)
    assert counts.tolist() == [20] * 9 + [2]
    assert done["results"][0]["angle_accuracy"] > 0.3


def test_a_finished_run_is_not_redone(tmp_path, capsys, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(argv)["results"] == first
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before


def test_common_figures_show_every_finished_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "draw_figures", lambda folder, runs: drawn.append([run.name for run in runs]))
    argv = ["--epochs", "1", "--out", str(tmp_path), "--method"]
    script.main([*argv, "plain"])
    script.main([*argv, "sphere"])
    assert sorted(drawn[-1]) == ["plain", "sphere"]


@pytest.mark.parametrize("argv, words", [
    (["--task", "retrain"], ["--task", "retrain", "retain"]),
    (["--task"], ["--task"]),
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100"]),
    (["--method", "cosine"], ["--method", "cosine", "plain"]),
    (["--task", "fewshot", "--net", "mlp"], ["--net", "mlp", "conv4"]),
    (["--net", "resnet12"], ["--net", "resnet12", "lenet"]),
    (["--net", "lenet"], ["--net lenet", "16 x 16", "8 x 8"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--batch-size", "1"], ["--batch-size", "1"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--radius", "0"], ["--radius", "0"]),
    (["--scale", "nan"], ["--scale", "nan"]),
    (["--weight-decay", "2"], ["--weight-decay", "2"]),
    (["--task", "fewshot", "--batch-size", "32"], ["--batch-size 32", "100 images"]),
    (["--task", "fewshot", "--test-episodes", "1"], ["--test-episodes", "2 or more"]),
    (["--dataset", "folder:nowhere"], ["nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_loss_that_is_not_finite(user_error, tmp_path):
    argv = ["--method", "plain", "--lr", "1e30", "--epochs", "1", "--out", str(tmp_path)]
    with user_error("not finite", "epoch 1, step", "--lr"):
        script.main(argv)
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_other_flags_than_the_run_had(user_error, tmp_path, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    script.main(argv)
    with user_error("--radius 5.0", "--overwrite"):
        script.main([*argv, "--radius", "2"])


def test_data_without_episodes():
    data = load_dataset("digits")
    args = script.parse(["--task", "fewshot", "--dataset", "cifar100"])
    with pytest.raises(UserError, match="superclasses"):
        script.split_by_class(args, data)
    few = data._replace(train_x=data.train_x[:60], train_y=data.train_y[:60])
    few = few._replace(test_x=data.test_x[:0], test_y=data.test_y[:0])
    with pytest.raises(UserError, match="--dataset digits: 5 train classes of"):
        script.split_by_class(script.parse(["--task", "fewshot"]), few)


def test_the_layer_learns_digits(tmp_path, no_figures):
    """Not a benchmark: four epochs of both, and only the baseline's features have different lengths."""
    argv = ["--method", "plain", "sphere", "--epochs", "4", "--eval-every", "4", "--out", str(tmp_path)]
    plain, sphere = script.main(argv)["results"]
    assert sphere["accuracy"] > 0.9 and plain["accuracy"] > 0.9
    assert sphere["norm_spread"] < 1e-6 < 0.02 < plain["norm_spread"]
    assert sphere["angle_accuracy"] > 0.9


def test_episodes_of_too_few_classes_or_images_are_refused():
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    for way, images in ((3, 2), (2, 4)):  # else rows of memory that nothing was written to
        with pytest.raises(ValueError, match="episode"):
            script.draw_episodes(y, 1, way, images, torch.Generator())
