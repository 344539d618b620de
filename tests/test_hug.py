"""hug.py: head, table of methods, schedule, attack, and runs on digits; energies in test_hug_theory."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bmls_msclf
import common
import hug as script


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_parameter_counts():
    sizes = [sum(p.numel() for p in make(3).parameters()) for make in script.NETWORKS.values()]
    assert sizes == [11_168_832, 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128)]


def test_the_largest_logit_is_the_nearest_proxy_or_16_cosines_or_free():
    f = torch.randn(20, 7, generator=generator())
    h, W = script.ProxyHead(7, 3, 5, "proxy").eval()(f)
    torch.testing.assert_close(h.norm(dim=1), torch.ones(20))
    assert torch.equal((h @ W.T).argmax(1), torch.cdist(h, W).argmin(1))
    h, W = script.ProxyHead(7, 3, 5, "cosine").eval()(f)
    torch.testing.assert_close(h @ W.T, 16 * F.cosine_similarity(h[:, None], W, dim=2))
    linear = script.ProxyHead(7, 3, 5, "linear").eval()
    h, W = linear(f)
    assert W is linear.W and h.norm(dim=1).std() > 0


def test_fixed_and_learnable_proxies_differ_in_that_alone():
    pairs = {"fixed+distance": "hug-mhe", "fixed+squared": "hug-mhe-squared", "fixed+ce": "ce+norm"}
    for fixed, learnable in pairs.items():
        assert script.METHODS[fixed][:3] == (*script.METHODS[learnable][:2], True)
    ladder = ["ce", "hug-fixed", *pairs, *pairs.values()]
    assert len({style["color"] for style in common.styles(ladder).values()}) == len(ladder)


def test_losses_of_the_table_are_their_definition():
    h, W = (F.normalize(torch.randn(n, 3, generator=generator(n)), dim=1) for n in (6, 4))
    y = torch.tensor([0, 0, 0, 0, 2, 2])
    ce = F.cross_entropy(h @ W.T, y, reduction="none")
    r = (h - W[y]).norm(dim=1)

    def by_class(losses):
        return (losses[:4].mean() + losses[4:].mean()) / 2

    energy = torch.pdist(W).pow(-2).mean()
    expected = {
        "ce": ce.mean(),
        "ce by class": by_class(ce),
        "mhe": energy + by_class(r),
        "mhe-squared": energy + by_class(r**2),
        "mhs": by_class(r) - torch.pdist(W).min(),
        "mgd": by_class(r) - ((-(torch.cdist(W, W) ** 2)).exp() + 1e-6 * torch.eye(4)).logdet() / 4,
        "dot-regression": (r**4).mean() / 8,
    }
    assert expected.keys() == script.LOSSES.keys() >= {method.loss for method in script.METHODS.values()}
    for name, loss in expected.items():
        assert script.LOSSES[name](h, W, y).item() == pytest.approx(loss.item(), rel=1e-5), name


def test_recipe_and_schedules():
    assert script.parse([]).dim >= 10 - 1  # the first run has room for a simplex of ten classes
    cifar = script.parse(["--dataset", "cifar100lt"])
    assert (cifar.net, cifar.epochs, cifar.batch_size, cifar.dim) == ("resnet18", 200, 128, 0)
    rate = [script.learning_rate(epoch, cifar) for epoch in (0, 4, 5, 102, 199)]
    half = 0.05 * (1 + np.cos(np.pi * 97 / 195))
    assert np.allclose(rate[:4], [0.02, 0.1, 0.1, half]) and 0 < rate[4] < 1e-4
    for epochs in ("1", "60", "200"):
        steps = script.parse(["--epochs", epochs, "--schedule", "steps"])
        for epoch in range(steps.epochs):
            assert script.learning_rate(epoch, steps) == bmls_msclf.learning_rate(epoch, steps)


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_the_attack_reaches_the_optimum_of_a_linear_classifier(scale, monkeypatch):
    """Whose worst case is known: the margin w . x grows along w, pixel by pixel up to ball and range."""
    monkeypatch.setattr(script, "ATTACKED", 500)
    monkeypatch.setattr(script, "PGD_STEPS", 10)
    V = torch.randn(2, 12, generator=generator())
    images = torch.randint(256, (200, 2, 2, 3), generator=generator(1)).to(torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    y = (x.flatten(1) @ V.T).argmax(1)
    head = torch.nn.Identity()
    head.forward = lambda f: (f, scale * V)
    model = torch.nn.ModuleDict({"network": torch.nn.Flatten(), "head": head})
    data = types.SimpleNamespace(test_x=images, test_y=y, mean=mean, std=std)
    run = types.SimpleNamespace(device="cpu", args=types.SimpleNamespace(dry_run=False))
    w = (V[1 - y] - V[y]).view_as(x)
    low, high, radius = ((v / std)[:, None, None] for v in (-mean, 1 - mean, torch.full((3,), 8 / 255)))
    worst = (x + radius * w.sign()).clamp(low, high)
    expected = ((w * worst).flatten(1).sum(1) < 0).double().mean().item()
    assert 0.8 < expected < 0.99
    assert script.robust_accuracy(model, data, run) == pytest.approx(expected)


@pytest.fixture(autouse=True)
def few_attacks(monkeypatch):
    """Attacks take longer than these small runs."""
    monkeypatch.setattr(script, "ATTACKED", 20)
    monkeypatch.setattr(script, "PGD_STEPS", 2)


QUICK = ["--per-class", "20", "--batch-size", "64", "--device", "cpu", "--precision", "fp32"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("flags", [
    ["--method", "hug-mhs", "--dim", "16", "--cut", "--schedule", "steps"],
    ["--method", "all", "--dim", "3", "--precision", "bf16"],
    ["--dataset", "digitslt", "--method", "ce", "ce+norm", "hug-mhe"],
])  # fmt: skip
def test_what_is_saved_reproduces_the_decisions(flags, tmp_path):
    results = script.main(["--dry-run", "--out", str(tmp_path), *flags])["results"]
    assert all(0 <= r["pgd"] <= 1 and np.isfinite(r["energy"]) for r in results)
    assert all(("few" in r) == ("digitslt" in flags) for r in results)
    for path in tmp_path.rglob("features.npz"):
        saved = np.load(path)
        result = json.loads(path.with_name("result.json").read_text())
        right = (saved["test_h"] @ saved["W"].T).argmax(1) == saved["test_y"]
        assert right.mean() == pytest.approx(result["accuracy"], abs=1e-12)
        right = (saved["train_h"] @ saved["W"].T).argmax(1) == saved["train_y"]
        lost = [right[saved["train_y"] == k].mean() < 0.1 for k in range(10)]
        assert result["lost_classes"] == sum(lost)


@pytest.mark.usefixtures("no_figures")
def test_fixed_class_vectors_are_the_most_uniform_and_stay_so(tmp_path):
    names = ["fixed+ce", "hug-fixed", "fixed+distance"]
    argv = ["--epochs", "2", "--dim", "9", *QUICK, "--out", str(tmp_path), "--method", *names]
    for result in script.main(argv)["results"]:
        assert result["energy"] == pytest.approx(1, abs=1e-6)  # K = d + 1: the simplex
        assert result["smallest_angle"] == pytest.approx(np.degrees(np.arccos(-1 / 9)), abs=1e-3)
    for path in tmp_path.rglob("metrics.jsonl"):
        assert len({json.loads(line)["energy"] for line in path.read_text().splitlines()}) == 1


def test_cut_bounds_the_steps_of_proxies(tmp_path):
    """Two of ten proxies on a circle start so close that uncut steps make them more than ten long."""
    length = []
    for cut in ([], ["--cut"]):
        argv = [*QUICK, "--epochs", "1", "--dim", "2", "--method", "hug-mhe", *cut]
        folder = script.main([*argv, "--out", str(tmp_path / str(cut))])["folder"]
        assert {path.name for path in Path(folder).glob("*.png")} == {"gap.png", "circle.png"}
        state = torch.load(f"{folder}/hug-mhe/seed0/checkpoint.pt", weights_only=True)
        length.append(state["model"]["head.W"].norm(dim=1).max())
    # at most 1 long at the start, then four steps at lr .1 with momentum .9
    assert length[1] <= 1 + 0.1 * (1 + 1.9 + 2.71 + 3.44) < 10 < length[0]


@pytest.mark.usefixtures("no_figures")
def test_reweight_is_for_cross_entropy_alone(tmp_path):
    W = {}
    for reweight in ("on", "off"):
        argv = ["--dataset", "digitslt", "--dry-run", "--method", "ce", "hug-mhe", "--reweight", reweight]
        folder = script.main([*argv, "--out", str(tmp_path / reweight)])["folder"]
        for name in ("ce", "hug-mhe"):
            W[name, reweight] = np.load(f"{folder}/{name}/seed0/features.npz")["W"]
    assert not np.array_equal(W["ce", "on"], W["ce", "off"])
    assert np.array_equal(W["hug-mhe", "on"], W["hug-mhe", "off"])


@pytest.mark.usefixtures("no_figures")
def test_hug_learns_the_digits_and_collapses_onto_uniform_proxies(tmp_path):
    """Not a benchmark: d = 16, where the simplex exists."""
    argv = ["--method", "hug-mhe", "--dim", "16", "--epochs", "8", "--eval-every", "8", "--per-class", "60"]
    (result,) = script.main([*argv, "--batch-size", "32", "--out", str(tmp_path)])["results"]
    assert result["accuracy"] > 0.9 and result["lost_classes"] == 0
    assert result["energy"] < 1.02 and result["within"] < 0.45


def test_bad_flags(user_error):
    with user_error("--batch-size 2", "3 or more"):
        script.parse(["--batch-size", "2"])
    with user_error("--dim 1", "two dimensions"):
        script.parse(["--dim", "1"])
