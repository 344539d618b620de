"""What all six scripts do alike, as a user meets it: started, killed, repeated, misused."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = {  # a method, few images and two epochs of each script
    "bmls_msclf": ["--method", "bmls+ms", "--batch-size", "64"],
    "etf_dr": ["--method", "etf+dr+mixup", "--batch-size", "64"],
    "hug": ["--method", "hug-mhe", "--per-class", "20"],
    "fno_continual": [
        "--method",
        "der++",
        "--classifier",
        "fno",
        "--mask",
        "--per-class",
        "20",
        "--tasks",
        "2",
    ],
    "nc_metrics": ["--per-class", "20"],
    "spherization": ["--method", "sphere", "--batch-size", "128"],
}
FLAGS = {  # every choice of the chapter's own flags, beside `--method all` with the defaults
    "bmls_msclf": [
        *("--ms unit --profile exp", "--ms dot --classifier etf --pairs distinct", "--alpha 0.2"),
        "--dataset digits --precision bf16 --net resnet32 --method bmls+ms",
    ],
    "etf_dr": ["--class-length off --reweight on", "--net resnet32 --width 2 --method etf+dr"],
    "hug": ["--dim 2 --cut --method hug-mhe", "--schedule steps --reweight on --method ce", "--dim 0"],
    "fno_continual": ["--no-bias --buffer 20 40 --method der++ --no-mask", "--net cnn --tasks 3"],
    "nc_metrics": ["--coarse pairs", "--optimizer adamw --lr 0.001", "--per-class 12"],
    "spherization": [
        *("--task overlap --method all", "--task fewshot --method all", "--task analogy --method all"),
        "--radius 2 --scale 1 --method sphere",
    ],
}
every_script = pytest.mark.parametrize("name", SHORT)


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, out, *words): its main in this process, on the CPU, in fp32; the runs."""

    def run(name, out, *words):
        script = importlib.import_module(name)
        script.main([*words, "--out", str(tmp_path / out), "--precision", "fp32", "--device", "cpu"])
        return [path.parent for path in sorted((tmp_path / out).rglob("result.json"))]

    return run


@pytest.fixture
def fast(monkeypatch):
    """For tests of anything else: figures take longer than these small runs; the dry runs draw them."""
    for name in SHORT:
        script = importlib.import_module(name)
        for draw in [key for key in vars(script) if key.startswith("draw_") and key != "draw_pairs"]:
            if draw in ("draw_figures", "draw_class_vectors"):
                monkeypatch.setattr(script, draw, lambda *_: None)


def bits(folder: Path):
    """Everything that a run computes; times are left out."""
    result = json.loads((folder / "result.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in (result, *history):
        entry.pop("seconds")
    with np.load(folder / "features.npz", allow_pickle=False) as arrays:
        features = {key: arrays[key].tobytes() for key in arrays.files}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    weights = {key: value.numpy().tobytes() for key, value in state.items()}
    return json.dumps([result, history]), features, weights


@every_script
def test_killed_and_gone_on_with_is_the_same_to_the_last_bit(
    name, run_script, run_until_killed, fast, tmp_path
):
    """kill -9 while the second checkpoint is being renamed, then in the middle of the second epoch."""
    words = [*SHORT[name], "--epochs", "2"]
    (whole,) = run_script(name, "whole", *words)
    broken = [*words, "--out", str(tmp_path / "broken"), "--precision", "fp32", "--device", "cpu"]
    run_until_killed(importlib.import_module(name).main, broken, "save", 2)
    run_until_killed(importlib.import_module(name).main, broken, "step", 2)
    (again,) = run_script(name, "broken", *words)
    assert bits(whole) == bits(again)
    assert not list((tmp_path / "broken").rglob("*.part*"))


@every_script
def test_the_seed_is_all_that_differs(name, run_script, fast):
    runs = {}
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        words = [*SHORT[name], "--epochs", "1", "--seed", seed]
        (runs[out],) = run_script(name, out, *words)
    assert bits(runs["a"]) == bits(runs["b"])
    assert bits(runs["a"])[2] != bits(runs["c"])[2]


@every_script
def test_a_finished_run_is_not_redone_and_other_flags_are_refused(name, run_script, fast, capsys, user_error):
    words = [*SHORT[name], "--epochs", "1"]
    (folder,) = run_script(name, "o", *words)
    before = (folder / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    run_script(name, "o", *words)
    assert "finished before; --overwrite" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == before
    with user_error(folder, "--epochs 1, not 2", "--overwrite"):
        run_script(name, "o", *SHORT[name], "--epochs", "2")
    run_script(name, "o", *words, "--overwrite")
    assert (folder / "result.json").stat().st_mtime_ns > before


@every_script
def test_a_learning_rate_that_destroys_the_network_leaves_no_result(name, run_script, fast, user_error):
    with user_error("not finite", "checkpoint", "--lr"):
        run_script(name, "o", *SHORT[name], "--epochs", "2", "--lr", "1e30")


@every_script
def test_main_leaves_the_process_as_it_was(name, run_script, fast):
    torch.set_default_dtype(torch.float64)
    try:
        state = torch.get_rng_state()
        threads = torch.get_num_threads()
        run_script(name, "o", *SHORT[name], "--epochs", "1")
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name, words", [(name, line) for name, lines in FLAGS.items() for line in lines])
def test_every_flag_trains(name, words, run_script, fast):
    folders = run_script(name, "o", "--dry-run", *words.split())
    assert folders
    for folder in folders:  # what is saved reproduces the network's decisions
        result = json.loads((folder / "result.json").read_text())
        if not (folder / "features.npz").exists():
            continue
        with np.load(folder / "features.npz", allow_pickle=False) as saved:
            if "W" in saved and "test_h" in saved:
                z = saved["test_h"] @ saved["W"].T + (saved["b"] if "b" in saved else 0)
                assert (z.argmax(1) == saved["test_y"]).mean() == pytest.approx(result["accuracy"], abs=1e-6)


@every_script
def test_dry_run_of_every_method(name, run_script, tmp_path, capfd):
    """One script as a user starts it, in a process of its own."""
    words = ["--dry-run", "--method", "all"]
    if name == "bmls_msclf":
        command = [sys.executable, ROOT / f"{name}.py", *words, "--out", tmp_path / "o"]
        subprocess.run(
            command, check=True, cwd=tmp_path, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    else:
        run_script(name, "o", *words)
    printed = capfd.readouterr()
    about = [line for line in printed.err.splitlines() if ": imbalance " not in line]
    assert not about  # no progress bar where there is no terminal, no warning
    assert "training images" in printed.out and "±" not in printed.out
    folders = [path.parent for path in (tmp_path / "o" / "dry-run" / name).rglob("result.json")]
    script = importlib.import_module(name)
    methods = script.METHODS["retain"] if name == "spherization" else script.METHODS
    assert len(folders) >= len(methods)
    wanted = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    assert all({path.name for path in folder.iterdir()} >= wanted for folder in folders)
    figures = list((tmp_path / "o").rglob("*.png"))
    assert figures and all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


BAD = {
    "--dataset cifar1000": ["--dataset cifar1000", "cifar100", "folder:PATH"],
    "--method smote": ["--method", "smote"],
    "--imbalance nan": ["--imbalance nan", "above 0"],
    "--epochs 0": ["--epochs 0", "above 0"],
    "--epochs many": ["--epochs", "many"],
    "--batch-size 2": ["--batch-size 2", "3 or more"],
    "--lr -1": ["--lr -1", "above 0"],
    "--weight-decay inf": ["--weight-decay inf"],
    "--seed -1": ["--seed -1"],
    "--over": ["--over"],
    "--net resnet34": ["--net", "resnet34"],
    "--dataset folder:nowhere": ["folder:", "nowhere"],
    "--device cuda": ["--device cuda"],
}


@every_script
@pytest.mark.parametrize("words", BAD)
def test_bad_flags_are_named_in_one_line_and_nothing_is_written(name, words, user_error, tmp_path):
    if words == "--device cuda" and torch.cuda.is_available():
        return
    script = importlib.import_module(name)
    with user_error(*BAD[words]):
        script.main([*words.split(), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@every_script
def test_a_class_without_test_images_is_nan_in_all_scripts(name, run_script, fast, tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(10).repeat(12)
    x = rng.integers(0, 256, (120, 28, 28, 1), dtype=np.uint8)
    arrays = {"train_x": x, "train_y": y, "test_x": x[y != 2], "test_y": y[y != 2]}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist.npz", **arrays, classes=np.arange(10).astype(str))
    words = [word for word in SHORT[name] if word not in ("--per-class", "20")]
    words += [] if name == "spherization" else ["--net", "cnn"]
    words += [
        "--dataset",
        "mnist",
        "--data-dir",
        str(tmp_path / "data"),
        "--epochs",
        "1",
        "--batch-size",
        "60",
    ]
    (folder,) = run_script(name, "o", *words)
    result = json.loads((folder / "result.json").read_text())
    assert math.isfinite(result["accuracy"]) and math.isfinite(result["train_accuracy"])
    if "per_class" in result:
        assert [k for k, value in enumerate(result["per_class"]) if math.isnan(value)] == [2]


@every_script
def test_a_leftover_of_torchrun_is_refused(name, user_error, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with user_error("RANK", "unset"):
        importlib.import_module(name).main(["--dry-run", "--out", str(tmp_path)])
    if name not in ("bmls_msclf", "etf_dr"):
        for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}.items():
            monkeypatch.setenv(key, value)
        with user_error("torchrun", "bmls_msclf.py"):
            importlib.import_module(name).main(["--dry-run", "--out", str(tmp_path)])


def test_help_without_docstrings():
    command = [sys.executable, "-OO", ROOT / "etf_dr.py", "--dataset", "cifar100lt", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--overwrite" in done.stdout and "(default: 200)" in done.stdout
