"""spherization.py: the layer against its definition, the tasks' parts, the program as a user meets it."""

import errno
import functools
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
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import spherization as script
from common import UserError, load_dataset
from spherization import Spherization

ROOT = Path(script.__file__).resolve().parent


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


@pytest.mark.parametrize("n", [1, 2, 3, 20, 45])  # 39 and below take the second branch of log sin
def test_values_and_gradients_are_the_definitions(n):
    z = 0.3 * torch.randn(6, n, dtype=torch.float64, generator=generator())
    g = torch.randn(6, n + 1, dtype=torch.float64, generator=generator(1))
    layer = Spherization(n, radius=2.0, scale=3.0).double()
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x, (expected, phi) = layer(ours), definition(theirs, s, 2.0)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(script.angles(x.detach()), phi.detach(), rtol=1e-9, atol=1e-12)
    (x * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.s.grad, s.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 41])
def test_gradient_check(n):
    z = torch.randn(3, n, dtype=torch.float64, generator=generator()).requires_grad_()
    s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, s: script.Spherize.apply(z, s, script.lower_bound(n), 5.0), (z, s)
    )


@given(
    n=st.sampled_from([1, 2, 7, 39, 40, 64, 500, 4096]),
    radius=st.sampled_from([1.0, 5.0, 64.0]),
    delta=st.sampled_from([1e-6, 1e-3, 0.5]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 20),
)
def test_in_float32_it_is_a_sphere(n, radius, delta, spread, shift, seed):
    z = shift + spread * torch.randn(4, n, generator=generator(seed))
    layer = Spherization(n, radius, 5.0, delta)
    x = layer(z).detach()
    assert x.shape == (4, n + 1) and x.dtype == torch.float32
    assert (x >= 0).all()
    assert (x.double().norm(dim=1) / radius - 1).abs().max() < 1e-6
    phi = layer.phi_L + (math.pi / 2 - layer.phi_L) * torch.sigmoid(5 * z.double())
    assert (script.angles(x) - phi).abs().max() < 1e-5
    assert x[:, -1].min() >= radius * delta * (1 - 2e-6)  # the last coordinate is the product of all sines


def test_gradients_in_float32_are_those_of_float64():
    for n in (2, 64, 4096):
        z, g = torch.randn(4, n, generator=generator()), torch.randn(4, n + 1, generator=generator(1))
        found = []
        for dtype in (torch.float32, torch.float64):
            layer, x = Spherization(n).to(dtype), z.clone().to(dtype).requires_grad_()
            layer(x).backward(g.to(dtype))
            found.append((x.grad.double(), layer.s.grad.double()))
        assert (found[0][0] - found[1][0]).abs().max() < 1e-5 * found[1][0].abs().max()
        assert (found[0][1] - found[1][1]).abs() < 1e-4 * found[1][0].abs().sum()


def test_images_are_spherized_pixel_by_pixel():
    z = torch.randn(2, 5, 3, 4, generator=generator()).requires_grad_()
    layer = Spherization(5)
    x = layer(z)
    assert x.shape == (2, 6, 3, 4)
    torch.testing.assert_close(x.norm(dim=1), torch.full((2, 3, 4), 5.0))
    torch.testing.assert_close(x[1, :, 2, 3], layer(z[1:, :, 2, 3])[0])
    g = torch.randn(x.shape, generator=generator(1))
    x.backward(g)
    rows = z.detach().permute(0, 2, 3, 1).reshape(-1, 5).requires_grad_()
    layer(rows).backward(g.permute(0, 2, 3, 1).reshape(-1, 6))
    torch.testing.assert_close(z.grad, rows.grad.view(2, 3, 4, 5).permute(0, 3, 1, 2))


def test_bf16_is_computed_in_float32():
    z, layer = torch.randn(8, 4096, generator=generator()), Spherization(4096)
    x = layer(z.bfloat16())
    assert x.dtype == torch.float32
    assert torch.equal(x, layer(z.bfloat16().float()))
    linear = torch.nn.Linear(10, 4096)
    with torch.autocast("cpu", torch.bfloat16):
        pre = linear(torch.randn(8, 10, generator=generator()))
        x = layer(pre)
    assert pre.dtype == torch.bfloat16 and x.dtype == torch.float32
    assert (x.double().norm(dim=1) / 5 - 1).abs().max() < 1e-6
    x.sum().backward()
    assert linear.weight.grad.isfinite().all() and linear.weight.grad.abs().max() > 0


def test_pieces_are_the_whole(monkeypatch):
    z, g = torch.randn(7, 50, generator=generator()), torch.randn(7, 51, generator=generator(1))
    found = []
    for chunk in (2**18, 100, 1):  # all rows, two rows, one row at a time
        monkeypatch.setattr(script, "CHUNK", chunk)
        layer, x = Spherization(50), z.clone().requires_grad_()
        y = layer(x)
        y.backward(g)
        found.append((y.detach(), x.grad, layer.s.grad))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
    assert Spherization(3)(torch.zeros(0, 3)).shape == (0, 4)


def test_nothing_of_size_n_squared_is_kept():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    layer = Spherization(4096)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 4096, requires_grad=True)).sum()
    assert sum(sizes) < 3.1 * 2 * 4097  # z, x and P
    assert sum(t.numel() for t in layer.state_dict().values()) == 1


@pytest.mark.parametrize("n", [2, 30, 64])
def test_the_published_matrix_form_is_the_same_map(n):
    z = torch.randn(5, n, generator=generator())
    published, layer = script.MatrixForm(n), Spherization(n)
    assert (published(z) - layer(z)).abs().max() < 2e-4  # its epsilons
    # its matrices as the formula says, entry by entry
    for i in range(n + 1):
        for j in range(n + 1):
            assert published.W_phi[i, j] == float(i < j and (i, j) != (n - 1, n))
            if i < n:
                assert published.W_theta[i, j] == float(i == j or (i, j) == (n - 1, n))


def test_learnable_is_about_the_scale():
    assert Spherization(3).s.requires_grad and not Spherization(3, learnable=False).s.requires_grad
    assert len(list(Spherization(3).parameters())) == 1


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"radius": 0.0}, {"scale": math.nan}, {"delta": 1.0}, {"delta": 1e-40}]
)
def test_bad_layers(wrong):
    with pytest.raises(ValueError, match="Spherization"):
        Spherization(**{"n": 3, **wrong})


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 4, 3)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"expected \(B, n\)"):
        Spherization(3)(torch.zeros(shape))


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
        ends = script.angle_operator(name, torch.tensor([1.0, -1.0], dtype=torch.float64))
        assert ends.tolist() == pytest.approx([1, -1], abs=2e-3)


def test_angle_operators_keep_gradients_finite():
    cos = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    for name in ("linear", "sigmoid"):
        (grad,) = torch.autograd.grad(script.angle_operator(name, cos).sum(), cos)
        assert grad.isfinite().all()


def test_heads():
    z, K = torch.randn(6, 4, generator=generator()), 3
    for kind in (*script.HEADS, *script.OPERATORS):
        head = script.Head(kind, 4, K, False, radius=5.0, scale=5.0, delta=1e-6, learnable=True)
        h, logits = head(z)
        assert (head.linear.bias is None) == (kind not in ("plain", "projected"))
        W = head.linear.weight
        cos = F.cosine_similarity(h[:, None], W[None], dim=2)
        g = (
            script.angle_operator(kind.removeprefix("w-"), cos)
            if kind not in (*script.HEADS, "none")
            else None
        )
        if kind in script.HEADS or kind == "none":
            expected = h @ W.T + (head.linear.bias if head.linear.bias is not None else 0)
        else:
            expected = g * (h.norm(dim=1, keepdim=True) if kind.startswith("w-") else 1)
        torch.testing.assert_close(logits, expected)
        if kind in ("sphere", "projected"):
            torch.testing.assert_close(
                h.norm(dim=1), torch.full((6,), 5.0 if kind == "sphere" else 1.0), atol=1e-3, rtol=0
            )
        else:
            assert torch.equal(h, z.relu())


@given(seed=st.integers(0, 30), gap=st.sampled_from([0.05, 0.5]))
def test_overlap_against_two_loops(seed, gap):
    g = generator(seed)
    h, y = torch.randn(9, 3, generator=g), torch.randint(3, (9,), generator=g)
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
    sphere = Spherization(3)(torch.randn(20, 3, generator=generator())).detach()
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
    assert torch.equal(episodes, script.draw_episodes(y, 30, 2, 8, generator()))


def test_prototype_logits_one_query_at_a_time():
    h = torch.randn(2, 3, 6, 4, generator=generator(), dtype=torch.float64)
    found = {metric: script.prototype_logits(h, 2, metric) for metric in ("euclidean", "cosine")}
    for e in range(2):
        for query in range(12):
            q = h[e, query // 4, 2 + query % 4]
            for k in range(3):
                p = (h[e, k, 0] + h[e, k, 1]) / 2
                cos = q @ p / q.norm() / p.norm()
                assert found["euclidean"][e, query, k].item() == pytest.approx(
                    -((q - p) ** 2).sum().item() / 128
                )
                assert found["cosine"][e, query, k].item() == pytest.approx(1000 * (cos.item() - 1) / 128)


def test_on_the_sphere_euclidean_logits_are_cosine_logits_a_twentieth_the_size():
    h = Spherization(8)(torch.randn(15, 8, generator=generator()).double()).detach().view(1, 5, 3, 9)
    euclidean, cosine = (script.prototype_logits(h, 1, metric) for metric in ("euclidean", "cosine"))
    torch.testing.assert_close(euclidean, cosine * 2 * 5**2 / 1000, rtol=1e-6, atol=1e-9)


def test_fc100_is_split_by_superclass():
    from common import SUPERCLASSES

    classes = tuple(sorted(name for members in SUPERCLASSES.values() for name in members.split()))
    split = script.split_classes("cifar100", classes)
    assert [len(split[name]) for name in ("train", "validation", "test")] == [60, 20, 20]
    assert sorted(k for members in split.values() for k in members) == list(range(100))
    names = {classes[k] for k in split["test"]}
    assert {"beaver", "bee", "fox", "baby"} <= names and not {"apple", "bear", "bus"} & names
    assert {"bear", "camel", "crab", "hamster"} <= {classes[k] for k in split["validation"]}
    assert script.split_classes("digits", tuple("0123456789"))["test"] == [5, 6, 7, 8, 9]


def test_networks_have_the_published_sizes():
    def count(*flags, shape=(28, 28, 1)):
        args = script.parse([*flags])
        trunk = script.build_trunk(args, shape, 0)
        return sum(p.numel() for p in trunk.parameters()), trunk.n

    assert count("--network", "mlp") == (784 * 500 + 500 + 500 * 300 + 300, 300)
    assert count("--network", "lenet") == (61_706 - 85 * 10, 84)  # LeNet-5 less its last layer
    features = sum(p.numel() for p in torchvision.models.vgg11_bn(weights=None).features.parameters())
    size, n = count("--network", "vgg11", "--dataset", "cifar10", shape=(32, 32, 3))
    assert n == 4096 and size == features + 512 * 4096 + 4096 + 4096 * 4096 + 4096
    _, n = count("--network", "cnn9", shape=(32, 32, 3))
    assert n == 256


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn", "cnn9"])
def test_networks_take_their_images(name):
    torch.manual_seed(0)
    args = script.parse(["--network", name])
    for shape, n in (((28, 28, 1), 0), ((32, 40, 3), 2)):
        trunk = script.build_trunk(args, shape, n)
        z = trunk(torch.randn(2, shape[2], *shape[:2]))
        assert z.shape == (2, trunk.n) and (not n or trunk.n == 2)
        assert n or z.min() < 0  # before any ReLU


def test_fashion_mnist_vgg_averages():
    args = script.parse(["--network", "vgg11", "--dataset", "fashionmnist", "--width", "0.05"])
    layers = [type(layer).__name__ for layer in script.build_trunk(args, (28, 28, 1), 0)]
    assert layers.count("AvgPool2d") == 5 and "MaxPool2d" not in layers and layers[0] == "Upsample"


@pytest.mark.parametrize("network, d", [("conv4", 64), ("resnet12", 640)])
@pytest.mark.parametrize("side", [8, 32])
def test_backbones(network, d, side):
    args = script.parse(["--task", "fewshot", "--network", network])
    for last in ("plain", "last"):
        backbone = script.build_backbone(args, (side, side, 1), last).eval()
        h = backbone(torch.randn(2, 1, side, side))
        assert h.shape == (2, d) and backbone.n == d
        if last == "last":
            assert h.min() < 0  # pre-activations: no ReLU after the last layer
        elif network == "conv4":
            assert h.min() >= 0


def test_rotation():
    x = torch.rand(3, 2, 5, 5, generator=generator())
    black = torch.tensor([-1.0, -2.0])
    torch.testing.assert_close(script.rotate(x, torch.zeros(3), black), x)
    turned = script.rotate(x, torch.tensor([90.0, -90.0, 180.0]), black)
    for i, k in enumerate((1, -1, 2)):
        either = [torch.rot90(x[i], sign * k, (1, 2)) for sign in (1, -1)]
        assert any(torch.allclose(turned[i], option, atol=1e-5) for option in either)
    corner = script.rotate(torch.zeros(1, 2, 9, 9), torch.tensor([45.0]), black)[0, :, 0, 0]
    torch.testing.assert_close(corner, black)


def test_published_schedules():
    def rates(*flags, epochs):
        args = script.parse(list(flags))
        return [script.learning_rate(e, args) / args.lr for e in epochs], args

    found, args = rates("--dataset", "cifar10", epochs=(0, 29, 30, 299))
    assert found == [1, 1, 0.5, 0.5**9] and (args.epochs, args.batch_size, args.lr) == (300, 128, 0.05)
    found, args = rates("--dataset", "cifar100", epochs=(59, 60, 119, 120, 160))
    assert np.allclose(found, [1, 0.2, 0.2, 0.04, 0.008]) and (args.epochs, args.lr) == (200, 0.1)
    found, args = rates("--dataset", "fashionmnist", epochs=(19, 20, 99))
    assert found == [1, 0.5, 0.5**4] and args.optimizer == "sgd"
    found, args = rates("--dataset", "mnist", epochs=(0, 99))
    assert found == [1, 1] and (args.network, args.epochs, args.weight_decay) == ("mlp", 100, 5e-5)
    found, args = rates("--task", "overlap", "--dataset", "cifar10", epochs=(79, 80, 130))
    assert np.allclose(found, [1, 0.1, 0.01]) and (args.network, args.epochs) == ("cnn9", 160)
    found, args = rates("--task", "fewshot", "--dataset", "cifar100", epochs=(9, 10, 99))
    assert found == [1, 0.5, 0.5**9] and (args.network, args.lr, args.epochs) == ("conv4", 1e-4, 100)


def test_subset():
    y = torch.randint(4, (300,), generator=generator())
    keep = script.balanced_subset(y, 4, 41)
    assert len(set(keep.tolist())) == 41
    assert sorted(torch.bincount(y[keep]).tolist()) == [10, 10, 10, 11]
    assert torch.equal(keep, script.balanced_subset(y, 4, 41))
    kept = script.spread(25_000)
    assert len(set(kept.tolist())) == 10_000 and kept[0] == 0 and kept[-1] == 24_999


# %% The theory check


BOUNDS = {2: 0.001, 64: 0.937, 84: 1.013, 256: 1.245, 300: 1.270, 640: 1.364, 4096: 1.4887}


@pytest.mark.parametrize("n, phi_L", BOUNDS.items())
def test_lower_bound(n, phi_L):
    assert script.lower_bound(n) == pytest.approx(phi_L, abs=6e-4)
    assert math.sin(script.lower_bound(n)) ** n == pytest.approx(1e-6, rel=1e-6)
    assert script.lower_bound(10**6) == 0.99 * math.pi / 2


def test_layer_peeled_two_classes_one_unit():
    """sigma(-t/2) = lam / sqrt 2 at the optimum; the norm of the one feature that is not zero follows."""
    for lam in (1e-3, 0.1):
        t = 2 * math.log(math.sqrt(2) / lam - 1)
        W, _, H, _ = script.layer_peeled(2, 1, lam, spherized=False)
        assert sorted(H.flatten().tolist()) == pytest.approx([0, (t / math.sqrt(2)) ** 0.5], abs=1e-4)
        assert (W[0] + W[1]).abs().item() < 1e-4
        # no bias, no ReLU trick: with the layer both are on the quarter circle of radius 5
        _, b, H, _ = script.layer_peeled(2, 1, lam, spherized=True)
        torch.testing.assert_close(H.norm(dim=1), torch.full((2,), 5.0).double())
        assert (b == 0).all()


toy, layer_peeled = functools.cache(script.toy), functools.cache(script.layer_peeled)  # once for two tests


def test_synthetic(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "toy", toy)
    monkeypatch.setattr(script, "layer_peeled", layer_peeled)
    assert script.main(["--synthetic", "--out", str(tmp_path)]) == {"ok": True}
    printed = capsys.readouterr().out
    assert "NO" not in printed and printed.count("  yes\n") > 45
    assert (tmp_path / "spherization" / "synthetic" / "synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_constant_fails_the_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "toy", toy)
    monkeypatch.setattr(script, "layer_peeled", layer_peeled)
    monkeypatch.setattr(script, "lower_bound", lambda n, delta=1e-6: math.asin((delta / 2) ** (1 / n)))
    with pytest.raises(SystemExit) as end:
        script.main(["--synthetic", "--out", str(tmp_path)])
    assert end.value.code == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
    assert (
        sum("phi_L" in line for line in failed) == 4
        and sum("smallest product" in line for line in failed) == 5
    )


# %% The program


def files(folder):
    """Everything that a run computes, for comparison to the last bit; times are left out."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in history:
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


SHORT = ["--method", "sphere", "--epochs", "4", "--batch-size", "300", "--precision", "fp32"]
SHORT += ["--device", "cpu"]
FOLDER = Path("spherization") / "retain" / "digits-mlp" / "sphere" / "seed0"


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, run_until_killed, no_figures):
    """kill -9 after an epoch that is logged but not saved, while its checkpoint is being renamed."""
    script.main([*SHORT, "--out", str(tmp_path / "whole")])
    broken = [*SHORT, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "save", 3)  # checkpoint 0, that of epoch 1, and now that of epoch 2
    script.main([*broken, "--resume"])
    assert_same_bits(files(tmp_path / "whole" / FOLDER), files(tmp_path / "broken" / FOLDER))
    assert not list((tmp_path / "broken").rglob(".*"))  # the half-renamed file is gone too


def interrupt(monkeypatch, at):
    """Ctrl-C at the at-th step of Adam."""
    step, calls = torch.optim.Adam.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)


FEWSHOT = ["--task", "fewshot", "--method", "cosine+sphere", "--epochs", "3", "--episodes", "4"]
FEWSHOT += ["--queries", "5"]


@pytest.mark.parametrize("kind", ["fewshot", "dropout"])
def test_interrupted_in_mid_epoch_and_resumed(kind, tmp_path, monkeypatch, capsys, no_figures):
    """Episodes come from our generator, dropout from torch's own: both go on where they were."""
    if kind == "dropout":
        build = script.build_trunk

        def with_dropout(*args):
            trunk = build(*args)
            trunk.append(torch.nn.Dropout())
            return trunk

        monkeypatch.setattr(script, "build_trunk", with_dropout)
        argv, folder = SHORT, FOLDER
    else:
        argv = [*FEWSHOT, "--test-episodes", "20"]
        folder = Path("spherization") / "fewshot" / "digits-conv4" / "cosine+sphere" / "seed0"
    script.main([*argv, "--out", str(tmp_path / "whole")])
    argv = [*argv, "--out", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(SystemExit) as end:
            script.main(argv)
    assert end.value.code == 130
    message = capsys.readouterr().err.strip()
    assert message.endswith("--resume") and "python spherization.py" in message
    torch.rand(17)  # the world goes on
    with pytest.raises(SystemExit) as end:  # not silently anew, nor silently on
        script.main(argv)
    assert end.value.code == 2 and "--resume" in capsys.readouterr().err
    script.main([*argv, "--resume"])
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
    argv += ["--method", "sphere", "sphere-3d"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "185,811 parameters" in done.stdout and "1,437 training images" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / "spherization" / "retain" / "digits-mlp"
    written = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    for name in ("sphere", "sphere-3d"):
        assert f"\n{name} " in done.stdout
        assert {path.name for path in (folder / name / "seed0").iterdir()} >= written
    for name in ("training", "sphere", "norm_angle"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "sphere" / "seed0" / "config.json").read_text())
    assert config["flags"]["method"] == "sphere" and config["hardware"] and config["versions"]["torch"]
    with np.load(folder / "sphere" / "seed0" / "features.npz", allow_pickle=False) as arrays:
        norms = np.linalg.norm(arrays["test_h"], axis=1)
        assert arrays["W"].shape == (10, 301) and np.allclose(norms, 5, rtol=1e-6)


@pytest.mark.parametrize("flags, figures", [
    (["--task", "overlap", "--method", "none", "w-linear", "cosine", "sphere"], {"overlap.png"}),
    (["--task", "visualise", "--network", "mlp", "--seed", "0", "1", "--method", "plain-2d"], {"sphere.png"}),
    (["--task", "visualise", "--method", "projected-2d", "sphere-2d"], {"sphere.png"}),
    (["--task", "fewshot", "--method", "euclidean", "euclidean+last", "cosine+sphere"], {"fewshot.png"}),
    (["--method", "sphere", "--precision", "bf16", "--delta", "1e-3", "--radius", "2"], set()),
    (["--method", "sphere", "--optimizer", "sgd", "--lr", "0.01", "--train-size", "100"], set()),
    (["--method", "sphere", "--fixed-scale", "--scale", "2", "--eval-every", "3"], {"norm_angle.png"}),
    (["--task", "fewshot", "--shots", "1", "--way", "3", "--queries", "4", "--method", "cosine"], set()),
])  # fmt: skip
def test_every_task_and_flag_trains(flags, figures, tmp_path, capsys):
    done = script.main(["--dry-run", "--out", str(tmp_path), *flags])
    printed = capsys.readouterr().out
    assert {path.name for path in Path(done["folder"]).iterdir()} >= figures
    for result in done["results"]:
        assert 0 <= result["accuracy"] <= 1
        if result["method"].startswith("sphere"):
            assert result["norm_spread"] < 1e-6
    if "overlap" in flags:
        assert "24.39" in printed and "not comparable" in printed
        sphere = done["results"][-1]
        assert sphere["hidden_counts"] == [0] * len(script.TAUS)
        assert all(sorted(r["near_counts"]) == r["near_counts"] for r in done["results"])


def test_a_finished_run_is_not_redone(tmp_path, capsys, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(argv)["results"] == first
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before
    script.main([*argv, "--overwrite"])
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns > before


def fail(argv, capsys, *words):
    """The program ends with 2 and one line on stderr that has these words."""
    with pytest.raises(SystemExit) as end:
        script.main([str(word) for word in argv])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("spherization.py: error: "), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("argv, words", [
    (["--task", "retrain"], ["--task", "retrain", "retain"]),
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100"]),
    (["--method", "cosine"], ["--method cosine", "--task retain", "plain"]),
    (["--task", "fewshot", "--network", "mlp"], ["--network mlp", "conv4"]),
    (["--network", "resnet12"], ["--network resnet12", "lenet"]),
    (["--network", "lenet"], ["--network lenet", "16 x 16", "8 x 8"]),
    (["--epochs", "0"], ["--epochs 0", "1 or more"]),
    (["--epochs", "many"], ["--epochs", "many"]),
    (["--batch-size", "1"], ["--batch-size 1", "BatchNorm"]),
    (["--train-size", "1"], ["BatchNorm"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--radius", "0"], ["--radius 0"]),
    (["--scale", "nan"], ["--scale nan"]),
    (["--delta", "1"], ["--delta 1"]),
    (["--norm-gap", "inf"], ["--norm-gap inf"]),
    (["--weight-decay", "2"], ["--weight-decay 2"]),
    (["--task", "fewshot", "--train-size", "9"], ["--train-size 9", "episodes"]),
    (["--task", "fewshot", "--way", "6"], ["--dataset digits", "5 train classes", "--way"]),
    (["--task", "fewshot", "--queries", "500"], ["--queries", "505"]),
    (["--task", "fewshot", "--test-episodes", "1"], ["--test-episodes 1", "2 or more"]),
    (["--dataset", "folder:nowhere"], ["folder:nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, capsys, tmp_path):
    fail([*argv, "--out", tmp_path], capsys, *words)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_bad_data_file(capsys, tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"PK not a zip file")
    fail(
        ["--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "o"],
        capsys,
        "mnist.npz",
        "delete it",
    )
    assert not (tmp_path / "o").exists()


def test_superclasses_are_cifar100s():
    with pytest.raises(UserError, match="superclasses"):
        script.split_classes("cifar100", tuple("abc"))


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    fail(
        ["--out", tmp_path / "file", "--method", "plain", "--dry-run"],
        capsys,
        str(tmp_path / "file"),
        "--out",
    )


def test_full_disk_keeps_the_last_checkpoint(capsys, tmp_path, monkeypatch, no_figures):
    argv, save, calls = [*SHORT, "--out", str(tmp_path)], torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 3:  # checkpoints 0 and 1 fit
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    fail(argv, capsys, "checkpoint.pt", "No space left")
    assert torch.load(tmp_path / FOLDER / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    monkeypatch.setattr(torch, "save", save)
    script.main([*argv, "--resume"])


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    argv = ["--method", "plain", "--optimizer", "sgd", "--lr", "1e30", "--epochs", "1", "--out", tmp_path]
    fail(argv, capsys, "not finite", "epoch 1, step", "checkpoint.pt", "--lr")
    folder = tmp_path / FOLDER.parent.parent / "plain" / "seed0"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 0 and all(v.isfinite().all() for v in state["model"].values())


def test_other_flags_than_the_run_had(capsys, tmp_path, no_figures):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    fail([*SHORT, "--epochs", "1", "--radius", "2", "--out", tmp_path], capsys, "--radius 5.0", "--overwrite")


def test_the_layer_learns_digits(tmp_path, no_figures):
    """Not a benchmark: six epochs of both, and only the baseline's features have different lengths."""
    argv = ["--method", "plain", "sphere", "--epochs", "6", "--eval-every", "6", "--out", str(tmp_path)]
    plain, sphere = script.main(argv)["results"]
    assert sphere["accuracy"] > 0.9 and plain["accuracy"] > 0.9
    assert sphere["norm_spread"] < 1e-6 < 0.02 < plain["norm_spread"]
    assert sphere["angle_accuracy"] > 0.9
    assert len(load_dataset("digits").test_y) == 360  # what these are shares of
