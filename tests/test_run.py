"""The Run part of common.py: flags, exit codes, tables, and a run folder that loses and believes nothing."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common

ROOT = Path(common.__file__).resolve().parent
CPU = torch.device("cpu")
DATA = SimpleNamespace(fingerprint="10 images, 1234")
OTHER_DATA = SimpleNamespace(fingerprint="11 images, 99")
METHODS = {"ce": "cross-entropy", "ms": "singletons"}
RECIPES = {"": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4}, "digits": {"epochs": 4}}


def parse(line: str, script: str = "hug"):
    flags = common.Flags(script, "One line.\n\nAnother.")
    flags.add_argument("--alpha", type=float, default=1.0, help="of this chapter")
    return flags.parse(line.split(), METHODS, ["ce"], RECIPES, eval_every=2)


def train(run: common.Run, total: int, during) -> dict:
    """What a script does: modules, optimisers, generators, tensors, and torch's own generator (dropout)."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sums = torch.zeros(2)
    parts = {"model": model, "optimizer": optimizer, "generator": generator, "sums": sums}
    for epoch in run.epochs(total, **parts):
        h = model(torch.randn(8, 3, generator=generator))
        optimizer.zero_grad()
        h.square().mean().backward()
        optimizer.step()
        sums += h.detach().sum(0)
        run.add_loss(h.mean())
        if run.is_test_epoch(epoch):
            run.log(accuracy=1 - epoch / 10)
        during(run, epoch, model)
    run.save_features(train_h=model[0].weight, sums=sums)
    return {"accuracy": 0.5, "few": math.nan}


@pytest.fixture
def command(tmp_path):
    """command(line, during, data, jobs): what a script's main does, into tmp_path. Returns finished_runs."""

    def command(line: str = "", during=lambda run, epoch, model: None, data=DATA, jobs=None):
        args = parse(f"--out {tmp_path} {line}")
        args.device = CPU
        args.precision = "fp32"
        for run in common.runs(args, data, jobs):
            run.finish(train(run, args.epochs, during))
        return common.finished_runs(args, data, jobs)

    return command


@pytest.fixture
def start(command, run_until_killed):
    """start(finished, line): a run that is finished, or killed in its third epoch."""
    return lambda finished, line: command(line) if finished else run_until_killed(command, line, "step", 3)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "hug" / "digits" / "ce" / "seed0"


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# %% Flags


def test_defaults_come_from_the_data_set():
    assert parse("").epochs == parse("--dataset digitslt").epochs == parse("--dataset=digits").epochs == 4
    assert parse("--dataset cifar10lt").epochs == parse("--dataset folderlt:a/b").epochs == 200
    assert parse("--epochs 7 --dataset digits").epochs == 7 and parse("").eval_every == 2
    assert parse("--method all").method == ["ce", "ms"] and parse("--method ms ce ms").method == ["ms", "ce"]
    assert parse("--out a --dataset folder:b/c").folder == Path("a/hug/folder-b-c")
    assert parse("--seed 0 3 0 --weight-decay 0 --test-share 0").seed == [0, 3]
    args = parse("--dry-run --epochs 9 --out a")
    assert args.epochs == 1 and args.overwrite and args.folder == Path("a/dry-run/hug/digits")
    common.Flags("hug", None).parse([], METHODS, ["ce"], RECIPES)  # no docstring: python -OO


def test_a_value_that_is_none_is_refused(user_error):
    above_0 = "--epochs --batch-size --lr --imbalance --image-size --eval-every --alpha".split()
    for flag in (*above_0, "--weight-decay", "--test-share", "--seed"):
        for value in ("-1", "nan", "inf", "-inf", "1e400", "one", "0"):
            if flag in above_0 or value != "0":
                with user_error(flag):
                    parse(f"{flag} {value}")
    too_large = ("--seed 9223372036854775808", "--epochs 9223372036854775808")
    for line in (*too_large, "--method nothing", "--out ~nobody/x", "--data-dir ~nobody/x", "--over"):
        with user_error(*line.split()):  # no abbreviations: --overwrite deletes
            parse(line)


def test_torchrun_is_for_two_scripts(monkeypatch, user_error):
    monkeypatch.setenv("RANK", "0")
    with user_error("RANK", "unset"):  # left over in the shell
        parse("")
    for name, value in ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"):
        monkeypatch.setenv(name, value)
    with user_error("torchrun", "bmls_msclf.py and etf_dr.py"):
        parse("")
    assert all(parse("", script).script == script for script in ("bmls_msclf", "etf_dr"))


def test_device_and_precision(monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto") == common.pick_device("cpu") == CPU
    with user_error("--device cuda", "--device auto"):
        common.pick_device("cuda")
    for words, auto in ("amx_bf16", "bf16"), ("sse2 avx512_bf16", "bf16"), ("avx512f amx_tile", "fp32"):
        monkeypatch.setattr(common, "CPU_INFO", f"flags : {words}\n")
        assert [common.pick_precision(name, CPU) for name in ("auto", "fp32")] == [auto, "fp32"]


# %% Runs: fresh, gone on with, finished


def test_what_a_run_writes(command, folder):
    (run,) = command("--alpha 3")
    assert contents(folder).keys() == set(common.Run.FILES)
    config = json.loads((folder / "config.json").read_text())
    decisive = {"alpha": 3.0, "epochs": 4, "lr": 0.1, "precision": "fp32", "data": DATA.fingerprint}
    assert config["setting"].items() >= decisive.items()
    assert not config["setting"].keys() & {"out", "folder", "device", "overwrite", "method", "seed"}
    assert torch.__version__.startswith(config["torch"]) and config["threads"] == torch.get_num_threads()
    assert (folder / "source.py").read_text() == (ROOT / "hug.py").read_text()
    assert [line.get("accuracy") for line in run.history] == [None, 0.9, None, 0.7]
    assert run.finished["best_accuracy"] == 0.9 and math.isnan(run.finished["few"])
    assert run.finished["seconds"] == sum(line["seconds"] for line in run.history)
    assert "accuracy" in command("--epochs 3 --overwrite")[0].history[-1]  # tested after the last epoch


@pytest.mark.parametrize("kind", ["step", "save"])
def test_killed_it_goes_on_with_the_same_bits(kind, command, folder, run_until_killed, capsys):
    """In the third epoch, or between its line in metrics.jsonl and its checkpoint."""
    (whole,) = command()
    expected = whole.load_features()
    run_until_killed(command, "--overwrite", kind, 3)
    config = (folder / "config.json").read_bytes()
    (folder / ".checkpoint.pt.123.part.pt").write_text("left by a kill")
    (run,) = command()
    assert "goes on after epoch 2" in capsys.readouterr().out
    found = run.load_features()
    assert all(np.array_equal(found[key], expected[key]) for key in expected) and found["sums"].any()
    lines = [[(line["epoch"], line["loss"]) for line in part.history] for part in (run, whole)]
    assert lines[0] == lines[1] and config == (folder / "config.json").read_bytes()
    assert contents(folder).keys() == set(common.Run.FILES)


def test_a_finished_run_is_passed_over_and_overwrite_trains_it_anew(command, folder, start, capsys):
    command()
    before = contents(folder)
    runs = command("--seed 1 0 --data-dir elsewhere")
    assert [run.config["seed"] for run in runs] == [0, 1] and contents(folder) == before
    assert "ce seed 0: finished before; --overwrite" in capsys.readouterr().out
    (folder / "notes.txt").write_text("mine")
    start(False, "--overwrite --lr 9")
    assert contents(folder).keys() == set(common.Run.FILES) - {"features.npz", "result.json"} | {"notes.txt"}
    (folder / "checkpoint.pt").unlink()  # killed before the first one: nothing was trained with these flags
    assert command("--lr 5")[0].config["setting"]["lr"] == 5


@pytest.mark.parametrize("finished", [False, True])
def test_another_setting_or_data_are_refused_and_named(finished, command, folder, start, user_error):
    start(finished, "")
    before = contents(folder)
    for line, words in ("--lr 0.2", "--lr 0.1, not 0.2"), ("--alpha 2", "--alpha 1.0, not 2.0"):
        with user_error(folder, words, "--overwrite"):
            command(line)
    with user_error(folder, "data 10 images, 1234, not 11 images, 99", "--overwrite"):
        command(data=OTHER_DATA)
    assert contents(folder) == before
    (folder / "config.json").unlink()  # nobody knows its flags then
    with user_error(folder, "None", "--overwrite"):
        command()


@pytest.mark.parametrize("edited", ["hug.py", "common.py"])
def test_code_that_was_edited(edited, command, folder, start, tmp_path, monkeypatch, user_error, capsys):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    for name in ("hug.py", "common.py"):
        (tmp_path / name).write_text("before")
    start(False, "")
    start(True, "--seed 1")
    (tmp_path / edited).write_text("after")
    with user_error(folder, f"another version of {edited}", "--overwrite"):
        command()
    command("--seed 1")
    assert f"finished before, with another version of {edited}" in capsys.readouterr().out
    command("--overwrite")


def test_which_runs_a_table_has(command, user_error):
    for line in ("--seed 4 2", "--method ms --lr 0.3", "--method ms --seed 1"):
        command(line)
    command("--method ms --seed 7", data=OTHER_DATA)
    found = [(run.name, run.finished["seed"]) for run in command("--seed 3")]
    assert found == [("ce", 2), ("ce", 3), ("ce", 4), ("ms", 1)]  # same setting and data, asked for first
    line, jobs = "--dataset digitslt", {"two": {"tasks": 2}, "five": {"tasks": 5}}  # they differ in a flag
    assert [run.name for run in command(line, jobs=jobs)] == ["two", "five"]
    with user_error("--tasks 5, not 6"):
        command(line, jobs={"five": {"tasks": 6}})


def test_a_run_folder_has_one_owner_and_none_once_it_is_killed(command, folder, user_error):
    def wait(run, epoch, model):
        (folder / f"{epoch}").touch()
        time.sleep(100 * epoch)

    owner = multiprocessing.get_context("fork").Process(target=command, args=("", wait))
    owner.start()
    while not (folder / "1").exists():
        time.sleep(0.01)
    before = contents(folder)
    for line in ("", "--overwrite", "--lr 9"):
        with user_error(folder, "another command"):
            command(line)
    assert contents(folder) == before
    owner.kill()
    owner.join()
    assert len(command()[0].history) == 4


# %% Faults


FINISHED = {"config.json": 1, "result.json": 1, "features.npz": 1, "metrics.jsonl": 0, "checkpoint.pt": 0}


@pytest.mark.parametrize("name", FINISHED)
@pytest.mark.parametrize("objects", [False, True])
def test_a_damaged_file_is_named_and_no_object_is_unpickled(
    name, objects, command, folder, start, user_error
):
    start(FINISHED[name], "")
    path = folder / name
    if objects and name == "checkpoint.pt":  # which could run any code
        torch.save({**torch.load(path, weights_only=True), "more": SimpleNamespace()}, path)
    else:
        path.write_bytes(b"\xff" if objects else path.read_bytes()[:-9])
    with user_error(path, "cannot be read", "--overwrite"):
        command()[0].load_features()
    assert len(command("--overwrite")[0].load_features()) == 2  # the refusal does not hold the folder's lock


@pytest.mark.parametrize("name", [name for name in FINISHED if "json" in name])
@pytest.mark.parametrize("text", ["[]\n", "null\n"])
def test_json_that_is_no_mapping_is_refused(name, text, command, folder, start, user_error):
    start(FINISHED[name], "")
    (folder / name).write_text(text)
    with user_error(folder / name, "cannot be read", "--overwrite"):
        command()


@pytest.mark.parametrize("at, what, kept", [
    (1, "epoch 1, step 2", "none"), (3, "epoch 3, step 2", "epoch 2, /"),
    (4, "after epoch 4", "epoch 3, /"),  # weights, broken in the very last step
])  # fmt: skip
def test_what_is_not_finite_stops_the_run(at, what, kept, command, folder, user_error):
    def spoil(run, epoch, model):
        if epoch + 1 == at:
            run.add_loss(torch.tensor(math.nan if at < 4 else 1.0))
            model[0].bias.data[1] = math.inf

    with user_error("ce seed 0", what, "--lr", f"Last good checkpoint: {kept}", folder if at > 1 else ""):
        command("", spoil)
    assert not contents(folder).keys() & {"result.json", "features.npz"}
    (run,) = command()
    run.title = "ce seed 0"
    with user_error("ce seed 0: features are not finite"):
        run.save_features(train_h=torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), RuntimeError("no space")])
def test_a_full_disk_leaves_the_old_file(error, command, folder, start, monkeypatch, user_error):
    def save(state, part):  # torch.save reports it as RuntimeError
        part.write_bytes(b"PK")
        raise error

    start(False, "")
    before = contents(folder)
    monkeypatch.setattr(torch, "save", save)
    with user_error(folder / "checkpoint.pt", "no space"):
        command()
    assert contents(folder) == {**before, "metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}
    folder.with_name("seed5").write_text("a file where a folder should be")
    with user_error(folder.with_name("seed5"), "cannot be written"):
        command("--seed 5")


def test_the_commit_is_that_of_the_folder_itself(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *who, *words], text=True).strip()

    copy = tmp_path / "inside another repository"
    copy.mkdir()
    (copy / "method.py").write_text("one")
    git("init", "--quiet")
    assert common._git_commit(tmp_path) == "unknown"  # no commit yet
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    assert common._git_commit(tmp_path) == git("rev-parse", "HEAD") and common._git_commit(copy) == "unknown"
    (copy / "method.py").write_text("two")
    assert common._git_commit(tmp_path) == git("rev-parse", "HEAD") + "+"


# %% main: torch's settings, exit codes, the table


def test_a_call_leaves_torch_as_it_was(request):
    @common.own_torch_settings()
    def main(number):
        torch.manual_seed(1)
        torch.set_num_threads(3)
        return torch.ones(1).dtype, 1 / number

    before = torch.get_num_threads(), torch.get_rng_state().tolist()
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    for number in (1, 0):
        with contextlib.suppress(ZeroDivisionError):
            assert main(number) == (torch.float32, 1)
        assert torch.get_default_dtype() == torch.float64
        assert (torch.get_num_threads(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("result, code, words", [
    ({"results": []}, 0, ""), ({"ok": False}, 1, ""),
    (common.UserError("--lr 0: expected more"), 2, "x.py: error: --lr 0: expected more"),
    (KeyboardInterrupt(), 130, "the same command, without --overwrite, goes on"),
])  # fmt: skip
def test_exit_codes(result, code, words, monkeypatch, capsys):
    def main():
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit, match=f"^{code}$"):
        common.command_line(main)
    assert words in (shown := capsys.readouterr().err.strip()) and "\n" not in shown


PROGRAM = """
import common, math
from types import SimpleNamespace as S
def main():
    columns = {"a": ("right", "%", "of all"), "h.own": ("own", "°", "angle"), "gone": ("gone", "", "")}
    runs = [("ce", 0.25, 90.0), ("ce", 0.75, 91.0), ("ms", math.nan, 7), ("old", 1, None)]
    runs = [S(name=name, finished={"a": a, "h": {"own": h}}) for name, a, h in runs]
    common.print_table(runs, columns, {"ce": "cross-entropy", "ms": "\u540d"})
    while True: print("more", flush=True)
common.command_line(main)
"""


def test_a_table_for_a_terminal_that_lacks_the_sign_and_a_reader_that_has_enough():
    """Mean and sample std (of 90 and 91: sqrt 1/2). In a process of its own, which `| head` ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes |= {"cwd": ROOT, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as endless:
        shown = [" ".join(endless.stdout.readline().split()) for _ in range(10)]
        endless.stdout.close()
        assert endless.stderr.read() == "" and endless.wait(60) == 141
    rows = ["ce 2 50.0 +- 35.4 90.5 +- 0.7", "ms 1 - 7.0", "old 1 100.0 -"]
    legend = ["right: % of all", "own: ? angle", "ce: cross-entropy", "ms: ?"]
    assert shown[1] == "method seeds right own" and shown[3:] == rows + legend
