"""hug.py: networks, attacks, corruptions, and the program as a user meets it; energies in test_hug_theory."""

import errno
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
from common import load_dataset

ROOT = Path(script.__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% Networks and heads


def test_parameter_counts():
    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(script.resnet18(3)) == 11_168_832  # 11.17 M without the last layer
    assert count(script.ResNet32(3)) + 64 * 10 + 10 == 464_154  # He et al. 2016, table 6: 0.46 M
    assert count(script.CNN(3)) == 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128)


@pytest.mark.parametrize("net", list(script.NETWORKS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 47), (1, 1, 1)])
def test_the_networks_take_any_image(net, shape):
    network = script.NETWORKS[net](shape[0]).eval()
    assert network(torch.randn(2, *shape)).shape == (2, network.d)


def test_the_nearest_proxy_is_the_largest_logit():
    head = script.Head(7, 3, 5, "proxy", 16.0).eval()
    h, W, z = head(torch.randn(20, 7))
    torch.testing.assert_close(h.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(W.norm(dim=1), torch.ones(5))
    assert torch.equal(z.argmax(1), torch.cdist(h, W).argmin(1))
    cosine = script.Head(7, 3, 5, "cosine", 16.0).eval()
    h, W, z = cosine(torch.randn(20, 7))
    torch.testing.assert_close(z, 16 * h @ W.T)
    linear = script.Head(7, 3, 5, "linear", 16.0).eval()
    h, W, z = linear(torch.randn(20, 7))
    assert W is linear.W and h.norm(dim=1).std() > 0
    torch.testing.assert_close(z, h @ W.T)


def test_a_gradient_is_cut_to_length_one_row_by_row():
    W = torch.zeros(3, 2, requires_grad=True)
    W.grad = torch.tensor([[3e6, 4e6], [0.3, 0.4], [0.0, 0.0]])
    script.limit_gradient(W)
    torch.testing.assert_close(W.grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_per_class_subset_is_balanced_random_and_its_own():
    data = load_dataset("digits")
    some, more = (script.per_class_subset(data, n, 0) for n in (5, 9))
    assert some.counts.tolist() == [5] * 10 and more.counts.tolist() == [9] * 10
    rows = {x.numpy().tobytes() for x in more.train_x}
    assert all(x.numpy().tobytes() in rows for x in some.train_x)  # the smaller is part of the larger
    assert torch.equal(script.per_class_subset(data, 5, 0).train_x, some.train_x)
    assert not torch.equal(script.per_class_subset(data, 5, 1).train_x, some.train_x)
    assert torch.equal(script.per_class_subset(data, 10_000, 0).counts, data.counts)
    pixels = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.train_x, data.train_y, strict=True)}
    assert all(
        (x.numpy().tobytes(), int(y)) in pixels for x, y in zip(some.train_x, some.train_y, strict=True)
    )


def test_the_reported_coefficients_and_the_flags():
    args = script.parse([])
    assert [script.coefficients(args, u) for u in ("mhe", "mhs", "mgd")] == [
        (0.15, 0.015), (0.15, 0.015), (0.15, 0.03)]  # fmt: skip
    assert script.coefficients(args, "ce") == (None, None)
    assert script.coefficients(script.parse(["--alpha", "2"]), "mgd") == (2.0, 0.03)
    assert script.parse(["--method", "hug", "--uniformity", "mgd"]).method == ["hug-mgd"]
    cifar = script.parse(["--dataset", "cifar100lt"])
    assert (cifar.net, cifar.epochs, cifar.batch_size, cifar.dim) == ("resnet18", 200, 128, None)
    rate = [script.learning_rate(e, cifar) for e in (0, 4, 5, 199)]
    assert np.allclose(rate[:3], [0.02, 0.1, 0.1]) and 0 < rate[3] < 1e-4
    one = script.parse(["--epochs", "1"])
    assert script.learning_rate(0, one) == 0.1


# %% Robustness and calibration


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


@pytest.mark.parametrize("name", script.CORRUPTIONS)
@pytest.mark.parametrize("size", [8, 2, 1])
def test_corruptions(name, size):
    mean, std = torch.tensor([0.5])[:, None, None], torch.tensor([0.25])[:, None, None]
    pixels = torch.full((4, 1, size, size), 0.4)
    pixels[:, :, 0, 0] = 0.5
    out = script.corrupt(name, (pixels - mean) / std, mean, std, generator()) * std + mean
    assert out.shape == pixels.shape and (out >= -1e-6).all() and (out <= 1 + 1e-6).all()
    if name == "brightness":
        torch.testing.assert_close(out, pixels + 0.3)
    elif name == "noise" and size == 8:
        assert 0.08 < (out - pixels).std() < 0.12
    elif name == "blur" and size == 8:
        assert out.std() < pixels.std() and abs(out.mean() - pixels.mean()) < 0.01
    again = script.corrupt(name, (pixels - mean) / std, mean, std, generator()) * std + mean
    assert torch.equal(out, again)


def test_the_temperature_is_the_best_of_a_grid():
    z = 0.1 * torch.randn(300, 4, generator=generator())
    y = torch.where(torch.rand(300, generator=generator(1)) < 0.7, z.argmax(1), 0)
    t = script.fit_temperature(z, y)
    grid = [F.cross_entropy(s * z, y).item() for s in np.geomspace(0.01, 1000, 300)]
    assert F.cross_entropy(t * z, y).item() <= min(grid) + 1e-5
    t = script.fit_temperature(torch.eye(4), torch.arange(4))  # separable: the loss falls on and on, to 0
    assert F.cross_entropy(t * torch.eye(4), torch.arange(4)) < 1e-6 and t <= 1000


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


QUICK = ["--per-class", "20", "--batch-size", "64", "--attack-images", "20", "--attack-steps", "2"]
QUICK += ["--device", "cpu", "--precision", "fp32"]
SHORT = ["--method", "hug-mhe", "--epochs", "4", *QUICK]  # 200 images, 4 steps an epoch
FOLDER = Path("hug") / "digits" / "hug-mhe" / "seed0"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", ["hug-mhe", "hug-fixed"])
def test_killed_and_resumed_is_the_same_to_the_last_bit(method, tmp_path, run_until_killed):
    """kill -9 in the first epoch, in the middle of a later one, and while a checkpoint is being renamed."""
    argv = [*SHORT, "--method", method, "--out"]
    script.main([*argv, str(tmp_path / "whole")])
    broken = [*argv, str(tmp_path / "broken")]
    again = [*broken, "--resume"]
    run_until_killed(script.main, broken, "step", 3)  # in epoch 1: nothing but checkpoint 0 is there
    run_until_killed(script.main, again, "step", 7)  # in epoch 2
    run_until_killed(script.main, again, "save", 2)  # after epoch 3, which is logged but not saved
    script.main(again)
    folder = FOLDER.parent.with_name(method) / "seed0"
    assert_same_bits(files(tmp_path / "whole" / folder), files(tmp_path / "broken" / folder))
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
    argv += ["--method", "ce", "hug-mgd"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "d = 2" in done.stdout and "10 classes" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / "hug" / "digits"
    for name in ("ce", "hug-mgd"):
        assert f"\n{name} " in done.stdout
        made = {path.name for path in (folder / name / "seed0").iterdir()}
        assert made >= {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz",
                        "source.py"}  # fmt: skip
    for name in ("uniformity", "robustness", "features"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "ce" / "seed0" / "config.json").read_text())
    assert config["flags"]["method"] == "ce" and config["hardware"] and config["versions"]["torch"]


@pytest.mark.parametrize("flags", [
    ["--method", "hug-mhs", "--intra", "sum", "--dim", "16"],
    ["--method", "hug-mhs", "--proxies", "fixed", "--net", "resnet32"],
    ["--method", "hug-fixed", "--uniformity", "mgd", "--dim", "3", "--mgd-epsilon", "0.5"],
    ["--method", "hug-mgd", "--reduction", "mean", "--precision", "bf16"],
    ["--dataset", "digitslt", "--method", "ce", "hug", "--eval-every", "3"],
])  # fmt: skip
def test_every_flag_trains(flags, tmp_path, monkeypatch):
    if "--dim" not in flags:  # half a second each; d = 2 is drawn by the test above, 3 and 16 here
        monkeypatch.setattr(script, "draw_figures", lambda folder, runs: [])
    results = script.main(["--dry-run", "--out", str(tmp_path), *flags])["results"]
    assert all(0 <= r["pgd"] <= 1 and np.isfinite(r["energy"]) for r in results)
    assert all(("few" in r) == ("digitslt" in flags) for r in results)


@pytest.mark.usefixtures("no_figures")
def test_proxies_stay_on_the_sphere_and_fixed_ones_stay_where_they_are(tmp_path):
    argv = [*SHORT, "--epochs", "2", "--out", str(tmp_path), "--method", "hug-mhs", "hug-fixed", "--dim", "9"]
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
    """Not a benchmark: 8 epochs, d = 16, where the simplex exists."""
    argv = ["--method", "hug-mhe", "--dim", "16", "--epochs", "8", "--eval-every", "8", "--per-class", "60"]
    (result,) = script.main([*argv, "--attack-images", "20", "--attack-steps", "2", "--out", str(tmp_path)])[
        "results"
    ]
    assert result["accuracy"] > 0.9
    assert result["energy"] < 1.01 and result["energy_M"] < 1.05 and result["within"] < 0.35


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


def test_synthetic_ends_with_one_where_a_claim_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "synthetic", lambda folder: False)
    with pytest.raises(SystemExit) as end:
        script.main(["--synthetic", "--out", str(tmp_path)])
    assert end.value.code == 1


def fail(argv, capsys, *words):
    """The program ends with 2 and one line on stderr that has these words."""
    with pytest.raises(SystemExit) as end:
        script.main([str(word) for word in argv])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("hug.py: error: "), message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100", "folder:PATH"]),
    (["--method", "hugs"], ["--method", "hugs", "hug-mhe"]),
    (["--uniformity", "mhc"], ["--uniformity", "mhc", "mgd"]),
    (["--epochs", "0"], ["--epochs 0", "1 or more"]),
    (["--batch-size", "2"], ["--batch-size 2", "3 or more"]),
    (["--dim", "1"], ["--dim 1", "2 or more"]),
    (["--per-class", "0"], ["--per-class 0"]),
    (["--alpha", "-1"], ["--alpha -1"]),
    (["--beta", "nan"], ["--beta nan"]),
    (["--attack-radius", "0"], ["--attack-radius 0"]),
    (["--attack-steps", "1"], ["--attack-steps 1"]),
    (["--weight-decay", "2"], ["--weight-decay 2"]),
    (["--net", "vgg"], ["--net", "vgg", "resnet32"]),
    (["--dataset", "folder:nowhere"], ["folder:nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, capsys, tmp_path):
    fail([*argv, "--out", tmp_path], capsys, *words)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_one_class_is_not_enough(capsys, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / "only" / f"{i}.png")
    fail(["--dataset", f"folder:{tmp_path}", "--out", tmp_path / "o"], capsys, "two classes", "folder:")
    assert not (tmp_path / "o").exists()


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


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    fail(["--out", tmp_path / "file", "--method", "ce", "--dry-run"], capsys, str(tmp_path / "file"), "--out")


@pytest.mark.usefixtures("no_figures")
def test_full_disk_keeps_the_last_checkpoint(capsys, tmp_path, monkeypatch):
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


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    argv = [*SHORT, "--method", "ce", "--lr", "1e30", "--out", tmp_path]
    fail(argv, capsys, "not finite", "epoch 1, step", "checkpoint.pt", "--lr")
    folder = tmp_path / "hug" / "digits" / "ce" / "seed0"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 0 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.usefixtures("no_figures")
def test_other_flags_than_the_run_had(capsys, tmp_path):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    fail([*SHORT, "--epochs", "1", "--beta", "0.5", "--out", tmp_path], capsys, "--beta None", "--overwrite")


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    step, calls = torch.optim.SGD.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    argv = [*SHORT, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    assert end.value.code == 130
    message = capsys.readouterr().err
    assert message.strip().endswith("--resume") and "python hug.py --method hug-mhe" in message
    assert torch.load(tmp_path / FOLDER / "checkpoint.pt", weights_only=True)["epoch"] == 1
    with pytest.raises(SystemExit) as end:  # not silently anew, nor silently on
        script.main(argv)
    assert end.value.code == 2 and "--resume" in capsys.readouterr().err
    script.main([*argv, "--resume"])
