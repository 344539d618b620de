"""The Run part of common.py: flags and exit codes, and a run folder that loses and believes nothing."""

import argparse
import errno
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import (
    Arguments,
    Run,
    UserError,
    from_json,
    mean_std,
    open_run,
    pick_device,
    pick_precision,
    table,
    to_json,
    write_atomically,
)

CPU = torch.device("cpu")
FLAGS = {"lr": 0.1, "epochs": 3, "sizes": (1, 2)}  # a tuple becomes a list in JSON: still the same flags
ROOT = Path(common.__file__).resolve().parent


@pytest.fixture
def start(tmp_path):
    """start(flags, overwrite=...) opens tmp_path/method/seed0 of the script bmls_msclf."""

    def start(flags=FLAGS, *, overwrite=False, fingerprint="10 images, 1234") -> Run:
        where = {"folder": tmp_path, "device": CPU, "overwrite": overwrite}
        args = argparse.Namespace(script="bmls_msclf", eval_every=2, precision="fp32", **where, **flags)
        return open_run(args, "method", 0, SimpleNamespace(fingerprint=fingerprint))

    return start


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "method" / "seed0"


def train(run: Run, total: int = 3, stop: int | None = None, loss=lambda epoch: 1 / epoch) -> torch.Tensor:
    """`total` epochs that add 1 to a tensor; interrupted in the body of epoch `stop`, counted from 0."""
    w = torch.zeros(2)
    for epoch in run.epochs(total, w=w):
        if epoch == stop:
            break
        w += 1
        run.add_loss(torch.tensor(loss(epoch + 1)))
        if run.is_test_epoch(epoch):
            run.log(accuracy=epoch / 10)
    return w


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# %% What a run writes


def test_config_and_source(start, folder):
    run = start()
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["flags"].items()
        >= {"lr": 0.1, "epochs": 3, "sizes": [1, 2], "method": "method", "seed": 0}.items()
    )
    assert not config["flags"].keys() & {"folder", "device", "overwrite"}
    assert config["data"] == "10 images, 1234"
    assert config["versions"]["torch"] == torch.__version__ and "torchvision" in config["versions"]
    assert config["hardware"] == common.hardware(CPU) and "thread" in config["hardware"]
    assert (folder / "source.py").read_bytes() == (ROOT / "bmls_msclf.py").read_bytes()
    assert run.finished is None and run.history == []


def test_commit_and_whether_files_differ_from_it(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert common._git_commit(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "method.py").write_text("one")
    git("add", "method.py")
    git("commit", "--message", "one")
    (tmp_path / "notes.txt").write_text("never added: no difference")
    assert common._git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "method.py").write_text("two")
    assert common._git_commit(tmp_path) == git("rev-parse", "HEAD") + "+"


def test_one_line_per_epoch_and_tests_every_other_one_and_at_the_end(start, folder):
    run = start()
    assert train(run, 5).tolist() == [5, 5]
    found = lines(folder)
    assert [line["epoch"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in found] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [line.get("accuracy") for line in found] == [None, 0.1, None, 0.3, 0.4]
    result = run.finish({"few": math.nan})
    assert result["best_accuracy"] == 0.4 and result["epochs"] == 5 and result["method"] == "method"
    assert result["seconds"] == pytest.approx(sum(line["seconds"] for line in found))


def test_nan_is_null_in_the_files_and_nan_again_when_read(start, folder):
    train(run := start())
    run.finish({"few": math.nan, "nested": [{"worst": math.inf}], "best": 0.5})
    text = (folder / "result.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["few"] is None and found["nested"] == [{"worst": None}] and found["best"] == 0.5
    assert math.isnan(Run(folder).finished["few"])
    assert math.isnan(from_json(to_json({"a": [[1, math.nan]]}))["a"][0][1])


def test_features_are_plain_arrays(start, folder):
    h = torch.randn(4, 3, requires_grad=True)
    start().save_features(train_h=h, train_y=torch.tensor([0, 1, 1, 0]), W=torch.ones(2, 3))
    with np.load(folder / "features.npz", allow_pickle=False) as file:
        assert set(file) == {"train_h", "train_y", "W"}
        assert file["train_h"].dtype == np.float32 and file["train_y"].dtype == np.int64
    np.testing.assert_array_equal(Run(folder).load_features()["train_h"], h.detach())


def test_nothing_but_the_named_files_is_left(start, folder):
    train(run := start())
    run.save_features(W=torch.ones(2, 3))
    run.finish({"accuracy": 1.0})
    assert {path.name for path in folder.iterdir()} == set(Run.FILES)


# %% Finished, interrupted, overwritten


def test_finished_run_is_not_redone(start, folder, capsys):
    train(run := start())
    run.finish({"accuracy": 0.5})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = start()
    assert again.finished["accuracy"] == 0.5 and again.history == lines(folder)
    assert "finished before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_interrupted_run_goes_on_by_itself(start, folder, capsys):
    train(start(), stop=2)
    config = (folder / "config.json").read_bytes()
    run = start()
    assert train(run).tolist() == [3, 3]
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]
    assert (folder / "config.json").read_bytes() == config


def test_epoch_that_was_logged_but_not_saved_is_trained_again(start, folder, monkeypatch):
    run = start()
    saved = run._save
    monkeypatch.setattr(run, "_save", lambda epoch, parts: saved(epoch, parts) if epoch < 3 else None)
    train(run)
    assert len(lines(folder)) == 3
    assert train(start()).tolist() == [3, 3]
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]


def test_run_without_a_checkpoint_starts_anew_with_any_flags(start, folder):
    train(start(), stop=0)
    run = start({**FLAGS, "lr": 9.0})
    assert json.loads((folder / "config.json").read_text())["flags"]["lr"] == 9.0
    assert train(run).tolist() == [3, 3]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "flags, name",
    [
        ({**FLAGS, "lr": 0.2}, "--lr 0.1, not 0.2; give the same --lr"),
        ({**FLAGS, "weight_decay": 1.0}, "--weight-decay"),  # a flag that is new
        ({"lr": 0.1, "sizes": (1, 2)}, "--epochs 3"),  # and one that is gone
    ],
)
def test_other_flags_are_named(finished, flags, name, start, folder, user_error):
    train(run := start(), stop=2)
    if finished:
        run.finish({"accuracy": 1.0})
    with user_error(folder, name, "--overwrite"):
        start(flags)


def test_flags_that_no_longer_count_are_ignored_in_an_old_config(start, folder):
    train(start(), stop=2)
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"script": "bmls_msclf", "out": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(config))
    run = start()
    assert train(run).tolist() == [3, 3]
    run.finish({"accuracy": 1.0})
    assert [found.folder for found in common.finished_runs(run.args, [Run(folder)])] == [folder]


@pytest.mark.parametrize("finished", [False, True])
def test_other_data_are_named(finished, start, folder, user_error):
    train(run := start(), stop=2)
    if finished:
        run.finish({"accuracy": 1.0})
    with user_error(folder, "other data", "10 images, 1234", "11 images, 99", "--overwrite"):
        start(fingerprint="11 images, 99")


@pytest.mark.parametrize("finished", [False, True])
def test_overwrite_starts_anew_and_leaves_strangers_files(finished, start, folder):
    train(run := start())
    run.save_features(W=torch.ones(2, 3))
    (folder / "my_notes.txt").write_text("mine")
    if finished:
        run.finish({"accuracy": 1.0})
    again = start({"lr": 9}, overwrite=True)
    assert again.finished is None and again.history == []
    assert {path.name for path in folder.iterdir()} == {"config.json", "source.py", "my_notes.txt"}
    assert train(again).tolist() == [3, 3]


@pytest.mark.parametrize("finished", [False, True])
def test_run_without_its_config_is_not_gone_on_with(finished, start, folder, user_error):
    """Nobody knows its flags then: neither train over it nor believe its result."""
    train(run := start())
    if finished:
        run.finish({"accuracy": 1.0})
    (folder / "config.json").unlink()
    with user_error(folder, "config.json", "--overwrite"):
        start()
    assert start(overwrite=True).finished is None


def test_loss_that_is_not_finite_names_epoch_step_and_checkpoint(start, folder, user_error):
    with user_error("epoch 3, step 1", "--lr", "epoch 2", folder / "checkpoint.pt"):
        train(start(), loss=lambda epoch: math.nan if epoch == 3 else 1.0)
    assert train(start()).tolist() == [3, 3]


def test_what_is_restored(start):
    """Modules, optimisers, generators, tensors, and torch's own generator, from which dropout draws."""

    def run_for(epochs, run):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        sums = torch.zeros(2)
        parts = {"model": layer, "optimizer": optimizer, "generator": generator, "sums": sums}
        for epoch in run.epochs(4, **parts):
            if epoch == epochs:
                break
            h = layer(torch.randn(8, 3, generator=generator))
            optimizer.zero_grad()
            h.square().mean().backward()
            optimizer.step()
            sums += h.detach().sum(0)
            run.add_loss(h.mean())
        return torch.cat([layer[0].weight.flatten(), sums]).detach()

    run_for(2, start())
    torch.rand(5)  # whatever happened in between
    gone_on = run_for(4, start())
    whole = run_for(4, start(overwrite=True))
    assert torch.equal(gone_on, whole)


def test_finished_runs_are_those_with_the_same_flags(start, folder, tmp_path):
    train(run := start())
    run.finish({"accuracy": 1.0})
    args = argparse.Namespace(folder=tmp_path)
    other = json.loads((folder / "config.json").read_text())
    for seed, lr in ((1, 0.1), (2, 0.3)):
        (path := tmp_path / "other" / f"seed{seed}").mkdir(parents=True)
        other["flags"] |= {"lr": lr, "method": "other", "seed": seed}
        (path / "config.json").write_text(json.dumps(other))
        (path / "result.json").write_text(json.dumps({"method": "other", "seed": seed}))
    found = common.finished_runs(args, [run])
    assert [(r.name, r.finished["seed"]) for r in found] == [("method", 0), ("other", 1)]


# %% Damaged files

NOT_JSON_OBJECTS = {
    "cut off": '{"flags": ',
    "empty": "",
    "a list": "[1]",
    "null": "null",
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS.values(), ids=NOT_JSON_OBJECTS.keys())
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_damaged_json(name, content, start, folder, user_error):
    train(run := start())
    run.finish({"accuracy": 1.0})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with user_error(folder / name, "--overwrite"):
        start()


@pytest.mark.parametrize("content", ['{"epoch": 1}\n{"epo', "{}\n", "[]\n", "7\n", '{"epoch": "one"}\n'])
def test_damaged_metrics(content, start, folder, user_error):
    train(start(), stop=2)
    (folder / "metrics.jsonl").write_text(content)
    with user_error(folder / "metrics.jsonl", "--overwrite"):
        start()


BAD_CHECKPOINTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "someone else's": lambda path: torch.save({"weight": torch.ones(3)}, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
}


@pytest.mark.parametrize("damage", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_checkpoint(damage, start, folder, user_error):
    train(start(), stop=2)
    damage(folder / "checkpoint.pt")
    with user_error(folder / "checkpoint.pt", "--overwrite"):
        train(start())


BAD_FEATURES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no features"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "one array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "pickled": lambda path: np.savez(path, W=np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("damage", BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
def test_damaged_features(damage, start, folder, user_error):
    run = start()
    run.save_features(W=torch.ones(2, 3))
    damage(folder / "features.npz")
    with user_error(folder / "features.npz", "--overwrite"):
        run.load_features()


class Trap:
    """Unpickling this creates the file `marker`: it stands for any code a stranger's checkpoint may run."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(form, start, folder, tmp_path, user_error):
    path, marker = folder / "checkpoint.pt", tmp_path / "marker"
    train(start(), stop=1)
    state = {"epoch": 1, "rng": torch.get_rng_state(), "w": Trap(marker)}
    if form == "torch.save":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    with user_error(path):
        train(start())
    assert not marker.exists()
    if form == "torch.save":
        torch.load(path, weights_only=False)  # the trap is real
    else:
        pickle.loads(path.read_bytes())  # noqa: S301
    assert marker.exists()


# %% Writing


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"  # folders are made

    def write(part):
        assert part.parent == path.parent  # a rename is atomic within one file system only
        assert part.suffix == ".txt"  # np.savez would append its own suffix to another
        part.write_text("whole")
        assert not path.exists()

    write_atomically(path, write)
    assert path.read_text() == "whole"
    before = path.stat().st_ino
    write_atomically(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
    assert path.stat().st_ino != before  # another file took its name: the old one was not written into
    assert list(path.parent.iterdir()) == [path]


FAILURES = {
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError, os.strerror(errno.ENOSPC)),
    "full disk, as torch.save says it": (
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 704 vs 598\nframe #0: ..."),
        UserError,
        "unexpected pos 704",
    ),
    "an error without words": (OSError(), UserError, "OSError"),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, ""),
    "our own mistake": (TypeError("not serializable"), TypeError, "not serializable"),
}


@pytest.mark.parametrize("error, becomes, words", FAILURES.values(), ids=FAILURES.keys())
def test_failed_write_leaves_the_old_file_and_nothing_else(error, becomes, words, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old and whole")

    def write(part):
        part.write_text("ha")
        raise error

    with pytest.raises(becomes) as caught:
        write_atomically(path, write)
    assert words in str(caught.value)
    if becomes is UserError:
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == "old and whole"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_a_checkpoint_is_saved(start, folder, monkeypatch, user_error):
    train(start(), stop=2)

    def save(state, part):
        part.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, user_error(folder / "checkpoint.pt", os.strerror(errno.ENOSPC)):
        patch.setattr(torch, "save", save)
        train(start())
    assert not [path for path in folder.iterdir() if "part" in path.name]
    assert train(start()).tolist() == [3, 3]


def test_next_write_takes_up_what_a_kill_left_behind(tmp_path):
    path, parts = tmp_path / "file.txt", []
    write_atomically(path, lambda part: (parts.append(part), part.write_text("whole")))
    parts[0].write_text("ha")  # kill -9 cleans nothing up
    write_atomically(path, lambda part: part.write_text("new"))
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_the_same_file(tmp_path, monkeypatch):
    """What is there in the end is one of theirs, not a mixture."""
    path = tmp_path / "data.npz"

    def write(part):
        part.write_text("first ")
        with monkeypatch.context() as patch:  # meanwhile, in the other process
            patch.setattr(os, "getpid", lambda: 1)
            write_atomically(path, lambda other: other.write_text("second"), shared=True)
        assert path.read_text() == "second"
        with part.open("a") as file:
            file.write("whole")

    write_atomically(path, write, shared=True)
    assert path.read_text() == "first whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("depth", ["method", "method/seed0"])
def test_file_where_the_run_folder_should_be(depth, overwrite, start, tmp_path, user_error):
    (tmp_path / depth).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / depth).write_text("a file")
    with user_error(tmp_path / depth):
        start(overwrite=overwrite)
    assert (tmp_path / depth).read_text() == "a file"


# %% Flags

RECIPES = {"": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4}, "digits": {"epochs": 30}}


@pytest.fixture
def parse():
    def parse(line: str) -> argparse.Namespace:
        flags = Arguments("x", "about", {"ce": "cross-entropy", "ms": "singletons"}, ["ce"], RECIPES)
        flags.add("--ms", choices=["raw", "unit"], default="raw", help="reading")
        return flags.parse(line.split())

    return parse


def test_defaults_come_from_the_data_set(parse):
    assert parse("").epochs == 30 and parse("--dataset digitslt").epochs == 30
    assert parse("--dataset cifar10lt").epochs == 200 and parse("--dataset folderlt:a/b").batch_size == 128
    assert parse("--dataset digits --epochs 7").epochs == 7
    assert parse("--method all").method == ["ce", "ms"] and parse("--method ms ce ms").method == ["ms", "ce"]
    assert parse("--out a --dataset folder:b/c").folder == Path("a/x/folder-b-c")
    assert parse("--out ~/a --data-dir=~/b").out == Path.home() / "a"
    assert parse("--data-dir=~/b").data_dir == Path.home() / "b"
    args = parse("--dry-run --epochs 9 --out a")
    assert args.epochs == 1 and args.overwrite and args.folder == Path("a/dry-run/x/digits")


@pytest.mark.parametrize("line, words", [
    ("--epochs 0", ["--epochs", "0", "1 or more"]),
    ("--epochs 1.5", ["--epochs", "1.5", "whole number"]),
    ("--batch-size 1", ["--batch-size", "2 or more"]),
    ("--lr 0", ["--lr", "above 0"]),
    ("--lr nan", ["--lr", "above 0"]),
    ("--lr inf", ["--lr", "above 0"]),
    ("--weight-decay -1", ["--weight-decay", "from 0 to 1"]),
    ("--seed -1", ["--seed", "0 or more"]),
    ("--seed 4294967296", ["--seed", "4294967295 or less"]),
    ("--method nothing", ["--method", "nothing", "ce"]),
    ("--ms nothing", ["--ms", "raw"]),
    ("--over", ["--over"]),  # no abbreviations: --overwrite deletes
    ("--nothing", ["--nothing"]),
])  # fmt: skip
def test_bad_flags(line, words, parse, user_error):
    with user_error(*words):
        parse(line)


def test_help_shows_each_default_as_it_is_typed(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 200; digits 30)" in text and "(default: ce)" in text and "(default: raw)" in text
    assert "None" not in text and "[" not in text.partition("options:")[2].replace("[M ...]", "").replace(
        "[SEED ...]", ""
    )
    assert text.index("--ms {raw,unit}", text.index("options:")) < text.index("training:")
    assert "ms singletons" in text


# %% Exit codes


def interrupt():
    raise KeyboardInterrupt


def complain():
    raise UserError("--lr 0: expected more")


@pytest.mark.parametrize("main, code, words", [
    (lambda: {"results": []}, 0, ""),
    (lambda: {"ok": False}, 1, ""),
    (complain, 2, "x.py: error: --lr 0: expected more"),
    (interrupt, 130, "the same command goes on"),
])  # fmt: skip
def test_exit_codes(main, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as ended:
        common.command_line(main)
    shown = capsys.readouterr().err.strip()
    assert ended.value.code == code and words in shown
    assert "\n" not in shown


def test_after_ctrl_c_overwrite_would_delete_what_was_trained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--overwrite"])
    with pytest.raises(SystemExit):
        common.command_line(interrupt)
    assert "without --overwrite" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    """In a process of its own: Python writes what is left to the closed pipe when it ends."""
    program = "import common\ndef main():\n    while True: print(1)\ncommon.command_line(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as endless:
        endless.stdout.readline()
        endless.stdout.close()
        assert endless.stderr.read() == ""
        assert endless.wait(60) == 141


# %% Device, precision, tables


@pytest.mark.parametrize(
    "cuda, mps, auto",
    [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")],
)
def test_pick_device(cuda, mps, auto, monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == auto
    assert pick_device("cpu").type == "cpu"
    for name, there in ("cuda", cuda), ("mps", mps):
        if there:
            assert pick_device(name).type == name
        else:
            with user_error(f"--device {name}", "--device auto"):
                pick_device(name)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("fpu sse2 avx512f avx512_bf16 amx_tile", "bf16"),
        ("fpu amx_bf16 amx_tile", "bf16"),
        ("fpu sse2 avx512f avx512_vnni amx_tile", "fp32"),  # wide, but does not multiply bf16
    ],
)
def test_precision_of_a_cpu(flags, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: f"model name : a processor\nflags\t\t: {flags}\n")
    assert pick_precision("auto", CPU) == expected
    assert (
        pick_precision("fp32", CPU) == "fp32" and pick_precision("bf16", CPU) == "bf16"
    )  # what is asked for


def test_precision_where_the_cpu_says_nothing(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert pick_precision("auto", CPU) == "fp32"
    assert common.hardware(CPU)  # falls back on what Python knows


@pytest.mark.parametrize("supported, expected", [(True, "bf16"), (False, "fp32")])
def test_precision_of_a_gpu(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert pick_precision("auto", torch.device("cuda")) == expected
    assert pick_precision("auto", torch.device("mps")) == "fp32"


def test_mean_std():
    assert mean_std([1.0, 3.0]) == "2.00 ± 1.41"  # sample std: sqrt(2)
    assert mean_std([0.25, 0.75, 0.5], digits=1, factor=100) == "50.0 ± 25.0"
    assert mean_std([0.5], factor=100) == "50.00"  # one seed has no spread to show
    assert mean_std([0.5, math.nan]) == "-"  # accuracy on classes that are not there


def test_table_is_aligned():
    text = table(["method", "few"], [["ce", "7.5"], ["bmls+msclf", 10]])
    assert text.splitlines() == ["method      few", "----------  ---", "ce          7.5", "bmls+msclf   10"]
