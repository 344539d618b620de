"""results/remedies.py: one table across the chapters, in which nothing is chosen on test images."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import remedies

import hug


@pytest.fixture
def cifar(tmp_path):
    """A cifar10.npz whose images are all different: its folder."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 25), ("test", 4)):
        arrays[f"{split}_y"] = np.repeat(np.arange(10), n)
        arrays[f"{split}_x"] = rng.integers(0, 256, (10 * n, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "cifar10.npz", **arrays, classes=np.array([f"c{k}" for k in range(10)]))
    return tmp_path / "data"


def test_held_out_images_are_trained_on_by_nobody(cifar, tmp_path):
    held_out = remedies.hold_out("cifar10", cifar, tmp_path / "held")
    full = np.load(cifar / "cifar10.npz")
    new = np.load(tmp_path / "held" / "cifar10.npz")
    assert held_out == 30  # the first, the eleventh and the twenty-first of each class's 25
    assert (np.bincount(new["train_y"]) == 22).all()
    assert (new["test_x"][:-held_out] == full["test_x"]).all()
    assert (np.bincount(new["test_y"][-held_out:]) == 3).all()

    def images(x):
        return {image.tobytes() for image in x}

    kept = images(new["train_x"])
    aside = images(new["test_x"][-held_out:])
    assert not kept & aside
    assert kept | aside == images(full["train_x"])


def test_held_out_file_follows_the_data(cifar, tmp_path):
    """A second call with other images does not train on the first one's."""
    remedies.hold_out("cifar10", cifar, tmp_path / "held")
    full = dict(np.load(cifar / "cifar10.npz"))
    full["train_x"] = 255 - full["train_x"]
    np.savez(cifar / "cifar10.npz", **full)
    remedies.hold_out("cifar10", cifar, tmp_path / "held")
    assert (np.load(tmp_path / "held" / "cifar10.npz")["train_x"][0] == full["train_x"][1]).all()


def write_run(folder, held_out_right, test_right):
    """A finished run whose own head is right on so many of ten images each."""
    folder.mkdir(parents=True)
    W = np.eye(10)
    train_y = np.repeat(np.arange(10), np.arange(20, 0, -2))

    def features(right):
        shift = np.arange(10) >= right  # a wrong image looks like the next class
        return W[(np.arange(10) + shift) % 10]

    np.savez(
        folder / "features.npz",
        train_h=W[train_y],
        train_y=train_y,
        test_h=np.concatenate([features(test_right), features(held_out_right)]),
        test_y=np.tile(np.arange(10), 2),
        W=W,
    )
    (folder / "config.json").write_text(json.dumps({"flags": {}}))
    (folder / "result.json").write_text(json.dumps({"method": "m", "train_accuracy": 0.9}))


def test_weight_decay_is_chosen_on_held_out_images_and_reported_on_test_images(tmp_path, capsys):
    """1e-3 is better on the test images, 2e-4 on those held out; 5e-3 is not finished."""
    for decay, on_held_out, on_test in (("1e-3", 4, 8), ("2e-4", 6, 5)):
        for seed in (0, 1):
            folder = tmp_path / f"wd{decay}" / "etf_dr" / "cifar10lt" / "etf+dr" / f"seed{seed}"
            write_run(folder, on_held_out, on_test + seed)
    write_run(tmp_path / "wd5e-3" / "etf_dr" / "cifar10lt" / "etf+dr" / "seed0", 9, 9)
    args = remedies.parse([str(tmp_path), "--seed", "0", "1"])
    ((name, (decay, by_seed)),) = remedies.choose(args, held_out=10).items()
    assert (name, decay) == ("ETF + DR", "2e-4")
    assert [each["own"] for each in by_seed] == [0.5, 0.6]
    assert [each["own_rare"] for each in by_seed] == [0, 0]  # classes 7, 8 and 9 are the wrong ones
    assert [each["nearest_mean"] for each in by_seed] == [0.5, 0.6]
    assert by_seed[0]["held_out"] == 0.6 and by_seed[0]["train"] == 0.9
    assert by_seed[0]["cosine"] == pytest.approx(0)
    assert (
        "weight decay 1e-3: 40.0 ± 0.0% of held-out and 85.0 ± 7.1% of test images" in capsys.readouterr().out
    )


def test_one_command_trains_all_goes_on_and_draws(cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hug, "learning_rate", hug.learning_rate)  # put back after the test
    for script in {script for script, _ in remedies.METHODS.values()}:
        monkeypatch.setattr(script, "draw_figures", lambda *_: [])
    command = [str(tmp_path / "out"), "--data-dir", str(cifar), "--epochs", "1", "--precision", "fp32"]
    command += ["--weight-decay", "1e-3", "--figure", str(tmp_path / "figure.png")]
    found = remedies.main(command)
    assert list(found) == list(remedies.METHODS)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    flags = [json.loads(path.read_text())["flags"] for path in (tmp_path / "out").rglob("config.json")]
    for shared in ("epochs", "batch_size", "lr", "weight_decay", "net", "precision", "dataset", "imbalance"):
        assert len({str(each[shared]) for each in flags}) == 1, shared
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert len(files) == 5
    assert remedies.main(command) == found  # nothing is trained again
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert capsys.readouterr().out.splitlines()[-7:] == table.splitlines()[-7:]


def test_hug_follows_the_others_schedule(monkeypatch, tmp_path):
    monkeypatch.setattr(hug, "learning_rate", hug.learning_rate)
    calls = []
    for script in {script for script, _ in remedies.METHODS.values()}:
        monkeypatch.setattr(script, "main", calls.append)
    args = remedies.parse([str(tmp_path), "--weight-decay", "1e-3", "2e-4"])
    remedies.train(args)
    assert len(calls) == 2 * len(remedies.METHODS)
    flags = argparse.Namespace(epochs=20, lr=0.1)
    rates = [hug.learning_rate(epoch, flags) for epoch in (10, 16, 19)]
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_nothing_finished_is_one_line(cifar, tmp_path, user_error):
    with user_error("no method is finished", tmp_path):
        remedies.main([str(tmp_path / "out"), "--data-dir", str(cifar), "--no-training"])
