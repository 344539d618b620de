"""results/collect.py: tables come from run folders and from nothing else."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import collect


def write_run(folder, method, seed, accuracy, script="bmls_msclf", loss=lambda epoch: 1.0, **setting):
    """A finished run of which only the settings matter; more measurements after `measured`."""
    folder.mkdir(parents=True)
    measured = setting.pop("measured", {})
    setting = {"lr": 0.1, "alpha": 1.0, "image_size": 32, "data": "4+2 images, 00000001", **setting}
    config = {"script": script, "seed": seed, "setting": setting, "commit": "0123456789abcdef"}
    result = {"method": method, "seed": seed, "accuracy": accuracy, **measured}
    (folder / "config.json").write_text(json.dumps({**config, "hardware": "an abacus"}))
    (folder / "result.json").write_text(json.dumps(result))
    history = [{"epoch": e, "loss": loss(e)} for e in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if ":--" not in line]


def test_mean_and_spread_over_seeds_a_row_for_each_setting(tmp_path, capsys):
    write_run(tmp_path / "a", "mixup", 0, 0.30)
    write_run(tmp_path / "b", "mixup", 1, 0.32)
    write_run(tmp_path / "c", "mixup", 0, 0.40, alpha=0.2)
    write_run(tmp_path / "d", "ce", 0, 0.20, loss=lambda epoch: 0.5**epoch)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text("{}")
    text = collect.main([str(tmp_path)])["table"]
    assert cells(text) == [
        ["method", "seeds", "accuracy %"],
        ["`ce`, alpha 1.0", "1", "20.0"],  # before mixup, as in the script
        ["`mixup`, alpha 1.0", "2", "31.0 ± 1.4"],  # std of .30 and .32 with n - 1
        ["`mixup`, alpha 0.2", "1", "40.0"],
    ]
    assert "bmls_msclf.py: data 4+2 images, 00000001, image size 32, lr 0.1." in text
    assert "an abacus" in text and "commit 0123456789." in text
    assert text.endswith("Training loss still falls: `ce`, alpha 1.0.")
    assert f"{tmp_path / 'e'}: not finished" in capsys.readouterr().err


@pytest.mark.parametrize("flag, values", [
    ("image_size", (32, 64)),
    ("test_share", (0.2, 0.3)),
    ("data", ("4+2 images, 00000001", "4+2 images, 00000002")),
])  # fmt: skip
def test_what_is_no_seed_is_not_averaged(flag, values, tmp_path):
    for seed, value in enumerate(values):
        write_run(tmp_path / str(seed), "ce", seed, 0.5 + 0.3 * seed, **{flag: value})
    names = [f"`ce`, {flag.replace('_', ' ')} {value}" for value in values]
    assert cells(collect.main([str(tmp_path)])["table"])[1:] == [
        [names[0], "1", "50.0"],
        [names[1], "1", "80.0"],
    ]


def test_a_copy_of_a_run_counts_once(tmp_path, capsys):
    for name in ("first", "copy"):
        write_run(tmp_path / name, "ce", 0, 0.5)
    assert cells(collect.main([str(tmp_path)])["table"])[1:] == [["`ce`", "1", "50.0"]]
    error = capsys.readouterr().err
    assert str(tmp_path / "first") in error and str(tmp_path / "copy") in error and "the same seed" in error


def test_runs_of_an_older_copy_have_flags_for_a_setting(tmp_path):
    for seed, size in enumerate((32, 64)):
        write_run(tmp_path / str(seed), "ce", seed, 0.5)
        config = {"flags": {"method": "ce", "seed": seed, "image_size": size}, "data": "4+2 images"}
        config |= {"commit": "0", "hardware": "an abacus"}
        (tmp_path / str(seed) / "config.json").write_text(json.dumps(config))
    names = [row[0] for row in cells(collect.main([str(tmp_path)])["table"])]
    assert names == ["method", "`ce`, image size 32", "`ce`, image size 64"]


def test_columns(tmp_path):
    """Titles and units are the scripts'; a dot leads into a dict; a script without an entry has a dash."""
    many = {"class_il": 0.30, "task_il": 0.9, "forgetting": 0.1}
    write_run(tmp_path / "a", "er", 0, 0.3, script="fno_continual", measured=many)
    assert cells(collect.main([str(tmp_path)])["table"])[0][2:] == [
        "class-IL %",
        "task-IL %",
        "forgetting %",
        "accuracy %",
    ]
    heads = {"heads": {"nearest_mean": 0.6}, "nc1": 0.00123}
    write_run(tmp_path / "b", "ce", 0, 0.5, measured=heads)
    columns = ["accuracy", "heads.nearest_mean", "nc1"]
    text = collect.main([str(tmp_path), "--columns", *columns])["table"]
    assert cells(text) == [
        ["method", "seeds", "accuracy %", "near mean %", "nc1"],
        ["`ce`, bmls_msclf", "1", "50.0", "60.0", "0.0012"],
        ["`er`, fno_continual", "1", "30.0", "-", "-"],
    ]


def test_bad_input(tmp_path, user_error):
    with user_error("no finished run", tmp_path):
        collect.main([str(tmp_path)])
    write_run(tmp_path / "a", "ce", 0, 0.5)
    with user_error("--columns", "speed"):
        collect.main([str(tmp_path), "--columns", "accuracy", "speed"])
