"""The record half of common.py: the run folder, and that nothing in it is lost, half-written or believed."""

import errno
import json
import math
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import Run, UserError, mean_std, pick_device, pick_precision, table, write_atomically

CPU = torch.device("cpu")
FLAGS = {"lr": 0.1, "epochs": 3, "sizes": (1, 2)}  # a tuple becomes a list in JSON: still the same flags


@pytest.fixture
def start(tmp_path):
    """start(flags, resume=..., overwrite=...) opens tmp_path/run for the script tmp_path/method.py."""
    script = tmp_path / "method.py"
    script.write_text("print('a method')\n")

    def start(flags=FLAGS, **options) -> Run:
        return Run(tmp_path / "run", flags, script, **options)

    return start


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


def train(run: Run, epochs: int = 3, checkpoints: int = 3) -> Run:
    """Epochs 1, 2, ... logged, of which the first `checkpoints` are saved: a kill may come in between."""
    for epoch in range(len(run.history) + 1, epochs + 1):
        run.log({"epoch": epoch, "loss": 1 / epoch})
        if epoch <= checkpoints:
            run.save_checkpoint({"epoch": epoch, "w": torch.full((2,), float(epoch))})
    return run


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# %% What a run writes


def test_config_and_source(start, folder, tmp_path):
    run = start()
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"] == {"lr": 0.1, "epochs": 3, "sizes": [1, 2]}
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["numpy"] == np.__version__
    assert {"python", "torchvision"} <= set(config["versions"])
    assert (
        config["hardware"] == common.hardware(CPU)
        and f"{torch.get_num_threads()} thread" in config["hardware"]
    )
    assert (folder / "source.py").read_bytes() == (tmp_path / "method.py").read_bytes()
    assert run.finished is None and run.history == [] and run.load_checkpoint(CPU) is None


def test_config_names_the_commit_and_whether_files_differ_from_it(start, folder, tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit_in_config():
        start(overwrite=True)
        return json.loads((folder / "config.json").read_text())["commit"]

    git("init")
    assert commit_in_config() == "unknown"  # no commit yet
    git("add", "method.py")
    git("commit", "--message", "one")
    (tmp_path / "notes.txt").write_text("never added: no difference")
    assert commit_in_config() == git("rev-parse", "HEAD")
    (tmp_path / "method.py").write_text("print('another method')\n")
    assert commit_in_config() == git("rev-parse", "HEAD") + "+"


def test_metrics_are_a_line_an_epoch(start, folder):
    train(start())
    assert lines(folder) == [{"epoch": e, "loss": 1 / e} for e in (1, 2, 3)]


def test_features_are_plain_arrays(start, folder):
    h = torch.randn(4, 3, requires_grad=True)
    start().save_features(train_h=h, train_y=torch.tensor([0, 1, 1, 0]), W=torch.ones(2, 3))
    with np.load(folder / "features.npz", allow_pickle=False) as file:
        assert set(file) == {"train_h", "train_y", "W"}
        np.testing.assert_array_equal(file["train_h"], h.detach())
        assert file["train_h"].dtype == np.float32 and file["train_y"].dtype == np.int64
    again = start().load_features()
    assert set(again) == {"train_h", "train_y", "W"}
    np.testing.assert_array_equal(again["train_h"], h.detach())


def test_nothing_but_the_named_files_is_left(start, folder):
    run = train(start())
    run.save_features(W=torch.ones(2, 3))
    run.finish({"accuracy": 1.0})
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "features.npz", "result.json"
    }  # fmt: skip


# %% Finished, unfinished, resumed, overwritten


def test_finished_run_is_not_redone(start, folder):
    run = train(start())
    result = {"accuracy": 0.5, "few": math.nan}  # nan: a group of classes may be empty
    run.finish(result)
    assert run.finished == result
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options in ({}, {"resume": True}):
        again = start(**options)
        assert again.finished["accuracy"] == 0.5 and math.isnan(again.finished["few"])
        assert again.history == lines(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unfinished_run_wants_resume(start, folder, user_error):
    train(start(), 2)
    with user_error(folder, "--resume", "--overwrite"):
        start()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "flags, name",
    [
        ({**FLAGS, "lr": 0.2}, "--lr 0.1"),
        ({**FLAGS, "weight_decay": 1.0}, "--weight-decay"),  # a flag that is new
        ({"lr": 0.1, "sizes": (1, 2)}, "--epochs 3"),  # and one that is gone
    ],
)
def test_other_flags_are_named(finished, resume, flags, name, start, folder, user_error):
    run = train(start(), 2)
    if finished:
        run.finish({"accuracy": 1.0})
    with user_error(folder, name, "--overwrite"):
        start(flags, resume=resume)


def test_resume_loads_the_checkpoint_and_cuts_the_history_to_it(start, folder):
    train(start(), epochs=3, checkpoints=2)  # killed after epoch 3 was logged and before it was saved
    config, source = (folder / "config.json").read_bytes(), (folder / "source.py").read_bytes()
    run = start(resume=True)
    state = run.load_checkpoint(CPU)
    assert state["epoch"] == 2 and state["w"].tolist() == [2, 2]
    assert [line["epoch"] for line in run.history] == [1, 2]
    train(run)
    assert lines(folder) == [{"epoch": e, "loss": 1 / e} for e in (1, 2, 3)]  # epoch 3 once
    assert ((folder / "config.json").read_bytes(), (folder / "source.py").read_bytes()) == (config, source)


@pytest.mark.parametrize("resume", [False, True])
def test_run_that_ended_before_its_first_checkpoint_starts_anew(resume, start, folder, tmp_path):
    train(start(), epochs=1, checkpoints=0)
    (tmp_path / "method.py").write_text("print('the method, mended')\n")
    run = start(resume=resume)
    assert run.load_checkpoint(CPU) is None and run.history == []
    assert (folder / "source.py").read_text() == "print('the method, mended')\n"  # what runs now
    assert [line["epoch"] for line in lines(train(run).folder)] == [1, 2, 3]


@pytest.mark.parametrize("finished", [False, True])
def test_overwrite_starts_anew(finished, start, folder):
    run = train(start())
    run.save_features(W=torch.ones(2, 3))
    if finished:
        run.finish({"accuracy": 1.0})
    again = start({"lr": 9}, overwrite=True)
    assert again.finished is None and again.history == [] and again.load_checkpoint(CPU) is None
    assert {path.name for path in folder.iterdir()} == {"config.json", "source.py"}
    assert json.loads((folder / "config.json").read_text())["flags"] == {"lr": 9}


def test_overwrite_leaves_strangers_files(start, folder):
    start()
    (folder / "my_notes.txt").write_text("mine")
    start(overwrite=True)
    assert (folder / "my_notes.txt").read_text() == "mine"


@pytest.mark.parametrize("finished", [False, True])
def test_run_without_its_config_is_not_gone_on_with(finished, start, folder, user_error):
    """Nobody knows its flags then: neither train over it nor believe its result."""
    run = train(start())
    if finished:
        run.finish({"accuracy": 1.0})
    (folder / "config.json").unlink()
    for options in ({}, {"resume": True}):
        with user_error(folder, "config.json", "--overwrite"):
            start(**options)
    assert start(overwrite=True).finished is None


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
    train(start()).finish({"accuracy": 1.0})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with user_error(folder / name, "--overwrite"):
        start()


@pytest.mark.parametrize("content", ['{"epoch": 1}\n{"epo', "{}\n", "[]\n", "7\n", '{"epoch": "one"}\n'])
def test_damaged_metrics(content, start, folder, user_error):
    train(start(), 2)
    (folder / "metrics.jsonl").write_text(content)
    with user_error(folder / "metrics.jsonl", "--overwrite"):
        start(resume=True).load_checkpoint(CPU)
    start(overwrite=True).finish({"accuracy": 1.0})
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
    train(start(), 2)
    damage(folder / "checkpoint.pt")
    with user_error(folder / "checkpoint.pt", "--overwrite"):
        start(resume=True).load_checkpoint(CPU)


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


def test_checkpoint_holds_no_code(start, folder):
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    states = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "rng": generator.get_state()}
    start().save_checkpoint({"epoch": 1, "best": 0.5, **states})
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["model"]["weight"].equal(layer.weight)
    assert state["optimizer"]["state"][0]["momentum_buffer"].equal(
        optimizer.state_dict()["state"][0]["momentum_buffer"]
    )
    assert state["rng"].equal(generator.get_state())


class Trap:
    """Unpickling this creates the file `marker`: it stands for any code a stranger's checkpoint may run."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(form, start, folder, tmp_path, user_error):
    path, marker = folder / "checkpoint.pt", tmp_path / "marker"
    train(start(), 1)
    state = {"epoch": 1, "w": Trap(marker)}
    if form == "torch.save":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    with user_error(path):
        start(resume=True).load_checkpoint(CPU)
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
    run = train(start(), 2)

    def save(state, part):
        part.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, user_error(folder / "checkpoint.pt", os.strerror(errno.ENOSPC)):
        patch.setattr(torch, "save", save)
        train(run)
    assert start(resume=True).load_checkpoint(CPU)["epoch"] == 2
    assert not [path for path in folder.iterdir() if "part" in path.name]


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
@pytest.mark.parametrize("depth", ["run", "run/digits/seed0"])
def test_file_where_the_run_folder_should_be(depth, overwrite, start, folder, tmp_path, user_error):
    folder.write_text("a file")
    with user_error(tmp_path / depth):
        Run(tmp_path / depth, FLAGS, tmp_path / "method.py", overwrite=overwrite)
    assert folder.read_text() == "a file"


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


def test_table_is_aligned():
    text = table(["method", "few"], [["ce", "7.5"], ["bmls+msclf", 10]])
    assert text.splitlines() == ["method      few", "----------  ---", "ce          7.5", "bmls+msclf   10"]
