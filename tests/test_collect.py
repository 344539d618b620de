"""results/collect.py: tables come from run folders and from nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "results" / "collect.py"
spec = importlib.util.spec_from_file_location("collect", PATH)
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)


def write_run(folder, method, seed, accuracy, loss=lambda epoch: 1.0, **flags):
    folder.mkdir(parents=True)
    flags = {"method": method, "seed": seed, "lr": 0.1, "alpha": 1.0, **flags}
    config = {"flags": flags, "commit": "0123456789abcdef", "hardware": "an abacus", "versions": {}}
    measured = dict.fromkeys(["best_accuracy", "many", "medium", "few", "ece"], accuracy)
    result = {
        "accuracy": accuracy,
        **measured,
        "minority_cosine_W": 0.5,
        "nc1": 1.25,
        "rule": "r",
        "seconds": 60,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"method": method, "heads": {"own": 0.5}, **result}))
    history = [{"epoch": e, "loss": loss(e)} for e in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (folder / "source.py").write_text('METHODS = {\n    "mixup": Method(1),\n    "ce": Method(2),\n}\n')


def test_mean_and_spread_over_seeds_a_row_for_each_set_of_flags(tmp_path, capsys):
    write_run(tmp_path / "a", "mixup", 0, 0.30)
    write_run(tmp_path / "b", "mixup", 1, 0.32)
    write_run(tmp_path / "c", "mixup", 0, 0.40, alpha=0.2)
    write_run(tmp_path / "0", "ce", 0, 0.20, loss=lambda epoch: 0.5**epoch, alpha=None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("{}")  # unfinished
    text = collect.main([str(tmp_path)])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    assert [row[0] for row in rows[2:]] == ["`mixup`", "`mixup`", "`ce`"]  # as in the script
    assert "None" not in text and "nan" not in text and "still falls: ce." in text
    assert rows[0][:4] == ["method", "--alpha", "seeds", "accuracy %"]
    assert rows[2][:4] == ["`mixup`", "1.0", "2", "31.00 ± 1.41"]  # std of .30 and .32 with n - 1
    assert rows[3][:4] == ["`mixup`", "0.2", "1", "40.00"]
    assert "--lr 0.1" in text and "an abacus" in text and "0123456789" in text
    assert "not finished" in capsys.readouterr().err


def test_into_a_page_between_its_markers(tmp_path):
    write_run(tmp_path / "runs" / "a", "ce", 0, 0.5)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin t -->\nold\n<!-- end t -->\nafter\n")
    for _ in range(2):  # the second time replaces the first
        text = collect.main([str(tmp_path / "runs"), "--into", str(page), "--name", "t"])
    assert page.read_text() == f"before\n<!-- begin t -->\n\n{text}\n\n<!-- end t -->\nafter\n"


@pytest.mark.parametrize("argv, words", [
    (["nowhere"], "no finished run"),
    (["runs", "--into", "missing.md"], "not readable"),
    (["runs", "--into", "page.md", "--name", "other"], "<!-- begin other -->"),
])  # fmt: skip
def test_bad_input(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", "ce", 0, 0.5)
    (tmp_path / "page.md").write_text("<!-- begin t --><!-- end t -->")
    with pytest.raises(SystemExit) as end:
        collect.main(argv)
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in message and "\n" not in message


def test_a_stream_has_its_own_columns(tmp_path):
    for seed, class_il in ((0, 0.30), (1, 0.32)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        flags = {"method": "er", "mask": True, "seed": seed}
        config = {"flags": flags, "commit": "0" * 40, "hardware": "abacus"}
        result = {"method": "er", "class_il": class_il, "task_il": 0.9, "forgetting": 0.1, "seconds": 60}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(result))
    lines = collect.main([str(tmp_path)]).splitlines()
    assert lines[0] == "| method | seeds | class-IL % | task-IL % | forgetting % |"
    assert lines[2] == "| `er` | 2 | 31.00 ± 1.41 | 90.00 ± 0.00 | 10.00 ± 0.00 |"
    assert not any("Groups" in line for line in lines)  # those of the long-tailed tables
