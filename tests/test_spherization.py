"""spherization.py: the layer against its definition, the parts of the tasks, the program's own refusals."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import spherization as script
from spherization import Spherization

ROOT = Path(script.__file__).resolve().parent
spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "spherization.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


FILES = ["--model", "m", "--text", "t", "--analogies", "a"]
CIFAR100 = ["--task", "fewshot", "--dataset", "cifar100"]


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
    return torch.stack(columns, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 39, 40, 45])  # from 40 on sines are taken from cosines
def test_values_and_gradients_are_the_definitions(n):
    z = 0.3 * torch.randn(6, n, dtype=torch.float64, generator=generator())
    g = torch.randn(6, n + 1, dtype=torch.float64, generator=generator(1))
    layer = Spherization(n, radius=2.0, scale=3.0).double()
    ours = z.clone().requires_grad_()
    theirs = z.clone().requires_grad_()
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = layer(ours)
    expected = definition(theirs, s, 2.0)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-13)
    (x * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.s.grad, s.grad, rtol=1e-9, atol=1e-12)


def test_images_are_spherized_pixel_by_pixel():
    z = torch.randn(2, 5, 3, 4, generator=generator())
    layer = Spherization(5)
    x = layer(z)
    assert x.shape == (2, 6, 3, 4)
    torch.testing.assert_close(x.norm(dim=1), torch.full((2, 3, 4), 5.0))
    torch.testing.assert_close(x[1, :, 2, 3], layer(z[1:, :, 2, 3])[0])


def test_bf16_is_computed_in_float32():
    layer = Spherization(4096)
    linear = nn.Linear(10, 4096)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(torch.randn(8, 10, generator=generator()))
        x = layer(z)
    assert z.dtype == torch.bfloat16 and x.dtype == torch.float32 and torch.equal(x, layer(z.float()))
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
    assert [name for name, s in layer.named_parameters()] == list(layer.state_dict()) == ["s"]


@pytest.mark.parametrize("wrong", [{"n": 0}, {"radius": 0.0}, {"scale": math.nan}, {"delta": 1.0}])
def test_bad_layers(wrong):
    with pytest.raises(ValueError, match="Spherization"):
        Spherization(**{"n": 3, **wrong})


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 4)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        Spherization(3)(torch.zeros(shape))


@pytest.mark.parametrize("n", [2, 30, 64])
def test_the_released_matrix_form_is_the_same_map(n):
    z = torch.randn(5, n, generator=generator())
    released = benchmark.MatrixForm(n)
    assert (released(z) - Spherization(n)(z)).abs().max() < 2e-4  # its epsilons


# %% Parts of the tasks


def test_the_cosine_head():
    h = torch.randn(6, 4, generator=generator())
    head = script.CosineHead(4, 3, bias=False)
    torch.testing.assert_close(head(h), F.cosine_similarity(h[:, None], head.weight[None], dim=2))


@pytest.mark.parametrize("task", ["retain", "overlap", "fewshot"])
def test_every_method_can_be_built(task):
    """sphere methods, and no others, have features on the sphere, of one dimension more."""
    data = common.load_dataset("digits")
    args = script.parse(["--task", task, "--radius", "2"])
    for name in script.METHODS[task]:
        model = script.TASKS[task][2](args, name, data).eval()
        z = model["trunk"](torch.randn(3, 1, 8, 8, generator=generator()))
        h = model["layer"](z)
        assert h.shape[1] == z.shape[1] + ("sphere" in name)
        assert torch.allclose(h.norm(dim=1), torch.full((3,), 2.0)) == ("sphere" in name)
        if task != "fewshot":
            assert model["head"](h).shape == (3, 10)
        if name.endswith("-3d"):
            assert h.shape[1] == 3 and getattr(model["layer"], "s", 1) == 1


def test_overlap_has_no_neighbours_without_another_class_or_a_direction():
    h = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    assert script.overlap(h, torch.tensor([0, 1, 1])).tolist() == [1, 1, 0]  # whatever the length
    assert script.overlap(h, torch.zeros(3)).tolist() == [-1, -1, -1]


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


def test_fc100_is_split_by_superclass():
    data = common.load_dataset("digits")
    classes = ("apple", *map(str, range(98)), "worm")  # of CIFAR-100: 0 apple, 3 bear, 13 bus, 34 fox, ...
    y = torch.arange(100).repeat(20)
    data = data._replace(classes=classes, train_x=y.view(-1, 1, 1, 1), train_y=y)
    data = data._replace(test_x=data.train_x[:0], test_y=y[:0])
    split = {}
    for name, (x, y) in script.split_by_class(script.parse(CIFAR100), data).items():
        assert torch.equal(x.flatten(), y)
        split[name] = set(y.tolist())
    assert len(split["train"]) == 60 and len(split["test"]) == 20 and not split["train"] & split["test"]
    assert {4, 6, 34, 2} <= split["test"] and {0, 13} <= split["train"]  # beaver, bee, fox, baby; apple, bus
    assert not {3, 15, 26, 36} & set.union(*split.values())  # to validate on: bear, camel, crab, hamster
    halves = script.split_by_class(script.parse(["--task", "fewshot"]), common.load_dataset("digits"))
    assert [set(y.tolist()) for _, y in halves.values()] == [{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}]


@pytest.mark.parametrize("flags, expected, rates", [  # what the printed commands train with
    ([], ("mlp", 80, 64, 5e-3, 5e-5), {0: 1, 63: 1, 64: 0.1, 79: 0.1}),
    (["--dataset", "digitslt", "--epochs", "5"], ("mlp", 5, 64, 5e-3, 5e-5), {3: 1, 4: 0.1}),
    (["--dataset", "mnist", "--net", "mlp"], ("mlp", 100, 256, 1e-3, 5e-5), {0: 1, 99: 1}),
    (["--dataset", "mnist", "--net", "lenet"], ("lenet", 20, 128, 1e-3, 0.0), {19: 1}),
    (["--task", "overlap", "--dataset", "mnist"], ("mlp", 100, 256, 1e-3, 5e-5), {99: 1}),
    (["--task", "fewshot"], ("conv4", 5, 100, 1e-3, 0.0), {0: 1, 4: 0.5**8}),
    (CIFAR100, ("conv4", 100, 100, 1e-4, 0.0), {9: 1, 10: 0.5, 99: 0.5**9}),
    (["--task", "analogy"], ("encoder", 12, 64, 3e-3, 0.0), {}),
    (["--task", "analogy", *FILES], ("encoder", 3, 8, 1e-4, 0.0), {}),
])  # fmt: skip
def test_recipes(flags, expected, rates):
    args = script.parse(flags)
    assert (args.net, args.epochs, args.batch_size, args.lr, args.weight_decay) == expected
    assert {epoch: script.learning_rate(epoch, args) / args.lr for epoch in rates} == pytest.approx(rates)
    layers, n = script.lenet((28, 28, 1))  # LeNet-5 less its last layer
    assert sum(p.numel() for p in nn.Sequential(*layers).parameters()) == 61_706 - 85 * 10 and n == 84


# %% The program


@pytest.mark.parametrize("task, method, words", [
    ("retain", "sphere-3d", ["by angle: %"]),
    ("overlap", "sphere", ["near: %"]),
    ("fewshot", "cosine+sphere", ["1-shot: %", "chance: %"]),
    ("analogy", "sphere+tuned", ["3CosAdd: %", "3,600 questions of 100 words"]),
])  # fmt: skip
def test_tasks_in_words_and_pictures(task, method, words, tmp_path, capsys):
    done = script.main(["--task", task, "--method", method, "--dry-run", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    figures = list(Path(done["folder"]).glob("*.png"))
    assert len(figures) == 1 and figures[0].read_bytes().startswith(b"\x89PNG")
    for word in [*words, f"\n{method}: {script.METHODS[task][method]}"]:
        assert word in printed


@pytest.mark.parametrize("task, name", [("retain", "plain"), ("overlap", "none"), ("overlap", "cosine")])
def test_measures_are_their_definitions(task, name, tmp_path, no_figures):
    """From features.npz alone, with numpy: W and b as the loss sees them, angles, lengths, overlap."""
    argv = ["--task", task, "--method", name, "--epochs", "1", "--precision", "fp32", "--out", str(tmp_path)]
    done = script.main(argv)
    result = done["results"][0]
    saved = common.Run(Path(done["folder"]) / name / "seed0").load_features()
    h, y = saved["test_h"].astype(float), saved["test_y"]
    assert ("b" in saved) == (name == "plain")
    wrong = (h @ saved["W"].T.astype(float) + saved.get("b", 0)).argmax(1) != y
    assert result["accuracy"] == pytest.approx(1 - wrong.mean(), abs=1e-12)
    M = np.stack([saved["train_h"][saved["train_y"] == k].astype(float).mean(0) for k in range(10)])
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    cos = u @ (M / np.linalg.norm(M, axis=1, keepdims=True)).T
    assert result["angle_accuracy"] == pytest.approx((cos.argmax(1) == y).mean(), abs=1e-12)
    assert result["within_cosine"] == pytest.approx(cos[np.arange(len(y)), y].mean())
    norm = np.linalg.norm(h, axis=1)
    assert result["norm_spread"] == pytest.approx(norm.std() / norm.mean())
    other = np.where(y[:, None] != y, u @ u.T, -1).max(1)
    for i, share in enumerate(result.get("near_shares", [])):
        near = 1 - other < script.TAUS[i]
        assert share == near.mean()
        errors = wrong[near].mean() if near.any() else np.nan
        assert result["near_errors"][i] == pytest.approx(errors, nan_ok=True)


@pytest.mark.parametrize("argv, words", [
    (["--task", "retrain"], ["--task", "retrain", "retain"]),
    (["--method", "cosine"], ["--method", "cosine", "plain"]),
    (["--task", "fewshot", "--net", "mlp"], ["--net", "mlp", "conv4"]),
    (["--net", "lenet"], ["--net lenet", "16 x 16", "8 x 8"]),
    (["--scale", "nan"], ["--scale", "nan"]),
    (["--task", "fewshot", "--batch-size", "32"], ["--batch-size 32", "100 images"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_data_without_episodes(user_error):
    data = common.load_dataset("digits")
    few = common.keep(data, torch.arange(60))._replace(test_x=data.test_x[:0], test_y=data.test_y[:0])
    with user_error("--dataset digits", "to train on", "5 classes of", "5 of 20"):
        script.split_by_class(script.parse(["--task", "fewshot"]), few)


def test_episodes_of_too_few_classes_or_images_are_refused():
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    for way, images in ((3, 2), (2, 4)):  # else rows of memory that nothing was written to
        with pytest.raises(ValueError, match="episode"):
            script.draw_episodes(y, 1, way, images, torch.Generator())
