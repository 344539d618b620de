"""hug.py: networks, attacks, and the program as a user meets it; energies in test_hug_theory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hug as script

ROOT = Path(script.__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% Networks and heads


def test_parameter_counts():
    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(script.resnet18(3)) == 11_168_832  # 11.17 M without the last layer
    assert count(script.SmallCNN(3)) == 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128)


@pytest.mark.parametrize("net", list(script.NETWORKS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 47), (1, 1, 1)])
def test_the_networks_take_any_image(net, shape):
    network = script.NETWORKS[net](shape[0]).eval()
    assert network(torch.randn(2, *shape)).shape == (2, network.d)


def test_the_nearest_proxy_is_the_largest_logit():
    head = script.Head(7, 3, 5, "proxy").eval()
    h, W, z = head(torch.randn(20, 7))
    torch.testing.assert_close(h.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(W.norm(dim=1), torch.ones(5))
    assert torch.equal(z.argmax(1), torch.cdist(h, W).argmin(1))
    cosine = script.Head(7, 3, 5, "cosine").eval()
    h, W, z = cosine(torch.randn(20, 7))
    torch.testing.assert_close(z, 16 * h @ W.T)
    linear = script.Head(7, 3, 5, "linear").eval()
    h, W, z = linear(torch.randn(20, 7))
    assert W is linear.W and h.norm(dim=1).std() > 0
    torch.testing.assert_close(z, h @ W.T)


@pytest.mark.parametrize("flags, form, weights", [
    ("", script.hug_loss, {"mhe": (1, 1), "mhs": (1, 1), "mgd": (1, 1)}),
    ("--inter 2", script.hug_loss, {"mhe": (2, 1)}),
    ("--reduction sum", script.hug_sum_loss, {"mhs": (0.15, 0.015), "mgd": (0.15, 0.03)}),
    ("--reduction sum --inter 2", script.hug_sum_loss, {"mgd": (2, 0.03)}),
    ("--reduction sum --intra 3", script.hug_sum_loss, {"mhe": (0.15, 3)}),
])  # fmt: skip
def test_reduction_and_weights(flags, form, weights):
    h, W = (F.normalize(torch.randn(n, 3, generator=generator(n))) for n in (6, 4))
    y = torch.tensor([0, 0, 1, 3, 3, 3])
    for kind, (alpha, beta) in weights.items():
        found = script.LOSSES[kind](h, W, h @ W.T, y, script.parse(flags.split()))
        assert found.item() == pytest.approx(form(h, W, y, kind, alpha, beta).item())


def test_recipe_and_schedule():
    digits = script.parse([])
    assert digits.dim >= 10 - 1  # the first run has room for a simplex of ten classes
    assert script.parse(["--dim", "2", "--epochs", "100"]).dim == 2
    cifar = script.parse(["--dataset", "cifar100lt"])
    assert (cifar.net, cifar.epochs, cifar.batch_size, cifar.dim) == ("resnet18", 200, 128, 0)
    rate = [script.learning_rate(e, cifar) for e in (0, 4, 5, 199)]
    assert np.allclose(rate[:3], [0.02, 0.1, 0.1]) and 0 < rate[3] < 1e-4
    assert script.learning_rate(0, script.parse(["--epochs", "1"])) == 0.1


def test_every_method_names_a_loss_that_exists():
    assert all(method.loss in script.LOSSES for method in script.METHODS.values())


def test_reweighted_cross_entropy_is_a_mean_class_by_class():
    z = torch.randn(5, 3, generator=generator())
    y = torch.tensor([0, 0, 0, 0, 2])
    losses = F.cross_entropy(z, y, reduction="none")
    found = script.weighted_ce(z, y, script.parse(["--reweight", "on"]))
    assert found.item() == pytest.approx((losses[:4].mean() + losses[4]).item() / 2)
    assert script.weighted_ce(z, y, script.parse([])).item() == pytest.approx(losses.mean().item())


# %% Robustness


class Linear(torch.nn.ModuleDict):
    """A linear classifier of pixels: the exact worst case of an linf attack is known."""

    def __init__(self, V):
        super().__init__({"network": torch.nn.Flatten(), "head": torch.nn.Identity()})
        self["head"].forward = lambda f: (f, V, f @ V.T)


def test_attacks_stay_in_the_ball_and_reach_the_linear_optimum():
    V = torch.randn(2, 12, generator=generator())
    x, y = torch.randn(6, 3, 2, 2, generator=generator(1)), torch.tensor([0, 1, 0, 1, 1, 0])
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    low, high, radius = (0 - mean) / std, (1 - mean) / std, 0.03 / std
    x = x.clamp(low, high)
    w = (V[1 - y] - V[y]).view_as(x)  # the margin z_other - z_own = w . x grows along w
    best = (x + radius * w.sign()).clamp(low, high)
    for steps in (1, 10):
        found = script.attack(Linear(V), x, y, radius, steps, low, high, generator())
        assert ((found - x).abs() <= radius + 1e-6).all()
        assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
        torch.testing.assert_close((w * found).sum(), (w * best).sum(), rtol=1e-4, atol=1e-4)


def test_an_attack_does_not_depend_on_the_scale_of_the_logits():
    V = torch.randn(4, 12, generator=generator())
    x, y = torch.randn(6, 3, 2, 2, generator=generator(1)), torch.tensor([0, 1, 2, 3, 1, 0])
    low, high, radius = (torch.full((3, 1, 1), v) for v in (-3.0, 3.0, 0.1))
    one, two = (script.attack(Linear(s * V), x, y, radius, 5, low, high, generator()) for s in (1.0, 256.0))
    assert torch.equal(one, two)


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


@pytest.fixture(autouse=True)
def few_attacks(monkeypatch):
    """Attacks take longer than these small runs."""
    monkeypatch.setattr(script, "ATTACKED", 20)
    monkeypatch.setattr(script, "PGD_STEPS", 2)


QUICK = ["--per-class", "20", "--batch-size", "64", "--device", "cpu", "--precision", "fp32"]
SHORT = ["--method", "hug-mhe", "--epochs", "4", *QUICK]  # 200 images, 4 steps an epoch
FOLDER = Path("hug") / "digits" / "hug-mhe" / "seed0"


@pytest.mark.usefixtures("no_figures")
def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, run_until_killed):
    """kill -9 in the first epoch, in the middle of a later one, and while a checkpoint is being renamed."""
    argv = [*SHORT, "--out"]
    script.main([*argv, str(tmp_path / "whole")])
    broken = [*argv, str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "step", 3)  # in epoch 1: nothing is saved yet
    run_until_killed(script.main, broken, "step", 7)  # in epoch 2
    run_until_killed(script.main, broken, "save", 2)  # after epoch 3, which is logged but not saved
    script.main(broken)
    assert_same_bits(files(tmp_path / "whole" / FOLDER), files(tmp_path / "broken" / FOLDER))
    assert not list((tmp_path / "broken").rglob(".*"))  # the half-renamed file is gone too


@pytest.mark.usefixtures("no_figures")
def test_the_seed_is_all_that_differs(tmp_path):
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*SHORT, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files((tmp_path / out / FOLDER).with_name(f"seed{seed}")))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["W"], results[2][2]["W"])


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, str(ROOT / "hug.py"), "--dry-run", "--out", str(tmp_path)]
    argv += ["--method", "ce", "hug-mgd", "--dim", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "10 classes" in done.stdout
    assert "linf 8/255, in one step and in 10" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / "hug" / "digits"
    for name in ("ce", "hug-mgd"):
        assert f"\n{name} " in done.stdout
        made = {path.name for path in (folder / name / "seed0").iterdir()}
        assert made >= {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz",
                        "source.py"}  # fmt: skip
    for name in ("gap", "robustness", "circle"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "ce" / "seed0" / "config.json").read_text())
    assert config["flags"]["method"] == "ce" and config["hardware"] and config["versions"]["torch"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("flags", [
    ["--method", "hug-mhs", "--dim", "16"],
    ["--method", "hug-mhs", "--reduction", "sum", "--inter", "2", "--intra", "0.5"],
    ["--method", "hug-fixed", "hug-mgd", "--dim", "3", "--precision", "bf16"],
    ["--dataset", "digitslt", "--method", "ce", "ce+norm", "hug-mhe", "--reweight", "on"],
])  # fmt: skip
def test_every_flag_trains(flags, tmp_path):
    results = script.main(["--dry-run", "--out", str(tmp_path), *flags])["results"]
    assert all(0 <= r["pgd"] <= 1 and np.isfinite(r["energy"]) for r in results)
    assert all(("few" in r) == ("digitslt" in flags) for r in results)
    for path in tmp_path.rglob("features.npz"):  # what is saved reproduces the network's decisions
        saved = np.load(path)
        result = json.loads(path.with_name("result.json").read_text())
        right = (saved["test_h"] @ saved["W"].T).argmax(1) == saved["test_y"]
        assert right.mean() == pytest.approx(result["accuracy"], abs=1e-12)


@pytest.mark.usefixtures("no_figures")
def test_proxies_stay_on_the_sphere_and_fixed_ones_stay_where_they_are(tmp_path):
    argv = [*SHORT, "--epochs", "2", "--out", str(tmp_path), "--method", "hug-mhs", "hug-fixed", "--dim", "9"]
    argv += ["--reduction", "sum"]
    moving, fixed = script.main(argv)["results"]
    assert fixed["energy"] == pytest.approx(1, abs=1e-6)  # K = d + 1: the simplex
    assert fixed["smallest_angle"] == pytest.approx(np.degrees(np.arccos(-1 / 9)), abs=1e-3)
    assert 1 < moving["energy"] < 1.5
    W = np.load(tmp_path / "hug" / "digits" / "hug-mhs" / "seed0" / "features.npz")["W"]
    assert np.allclose(np.linalg.norm(W, axis=1), 1, atol=1e-6)
    lines = (tmp_path / "hug/digits/hug-fixed/seed0/metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["energy"] for line in lines}) == 1


@pytest.mark.usefixtures("no_figures")
def test_hug_learns_the_digits_and_collapses_onto_uniform_proxies(tmp_path):
    """Not a benchmark: d = 16, where the simplex exists."""
    argv = ["--method", "hug-mhe", "--dim", "16", "--epochs", "8", "--eval-every", "8", "--per-class", "60"]
    argv += ["--batch-size", "32", "--out", str(tmp_path)]
    (result,) = script.main(argv)["results"]
    assert result["accuracy"] > 0.9
    assert result["energy"] < 1.02 and result["within"] < 0.45


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_is_not_redone(tmp_path, capsys):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(argv)["results"] == first
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before
    script.main([*argv, "--overwrite"])
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100", "folder:PATH"]),
    (["--method", "hugs"], ["--method", "hugs", "hug-mhe"]),
    (["--reduction", "mean"], ["--reduction", "mean", "official"]),
    (["--batch-size", "2"], ["--batch-size 2", "3 or more"]),
    (["--dim", "1"], ["--dim 1"]),
    (["--per-class", "0"], ["--per-class", "1 or more"]),
    (["--inter", "-1"], ["--inter", "above 0"]),
    (["--intra", "nan"], ["--intra", "above 0"]),
    (["--net", "vgg"], ["--net", "vgg", "resnet18"]),
    (["--dataset", "folder:nowhere"], ["folder:", "nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.usefixtures("no_figures")
def test_two_classes_from_a_folder(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for k in range(2):
            (tmp_path / split / f"c{k}").mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 200 * k, 0)).save(tmp_path / split / f"c{k}" / f"{i}.png")
    argv = ["--dataset", f"folder:{tmp_path}", "--image-size", "8", "--net", "cnn", "--dim", "2", "--dry-run"]
    results = script.main([*argv, "--method", "ce", "hug-mhe", "--out", str(tmp_path / "o")])["results"]
    assert [len(r["per_class"]) for r in results] == [2, 2]


def test_a_loss_that_is_not_finite(user_error, tmp_path):
    with user_error("not finite", "epoch 1, step", "checkpoint: none", "--lr"):
        script.main([*SHORT, "--method", "ce", "--lr", "1e30", "--out", str(tmp_path)])


@pytest.mark.usefixtures("no_figures")
def test_other_flags_than_the_run_had(user_error, tmp_path):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    with user_error("--intra None, not 0.5", "--overwrite"):
        script.main([*SHORT, "--epochs", "1", "--intra", "0.5", "--out", str(tmp_path)])


@pytest.mark.parametrize("loss", ["hug_loss", "hug_sum_loss"])
def test_an_unknown_uniformity_is_refused(loss):
    with pytest.raises(ValueError, match="MHE"):
        getattr(script, loss)(torch.eye(3), torch.eye(3), torch.arange(3), "MHE", 1.0, 1.0)


def test_the_loss_of_bf16_features_is_computed_in_float32():
    h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = script.hug_loss(h, torch.eye(3, 4), torch.arange(6) % 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        script.hug_loss(h.double(), torch.eye(3, 4).double(), torch.arange(6) % 3).item(), rel=1e-5
    )
