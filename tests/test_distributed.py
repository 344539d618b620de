"""More than one process: bmls_msclf.py and etf_dr.py under torchrun compute what one process computes.

Two processes with gloo. They are forked from a server that has imported the scripts once, and get the
environment that torchrun would give them; one test goes through torchrun itself.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from torch import nn

import bmls_msclf
import common
import etf_dr

ROOT = Path(common.__file__).resolve().parent
SHORT = "--dataset digits --epochs 2 --eval-every 2 --batch-size 40 --lr 0.1 --weight-decay 1e-3".split()
CASES = [  # script, two methods, flags
    (bmls_msclf, "ce bmls+ms", "--ms unit"),
    (etf_dr, "ce+mixup etf+dr+mixup", "--class-length on --reweight on"),
]


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports once what each rank would import for itself; torch._dynamo is what an optimiser imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.set_forkserver_preload(
            ["test_distributed", "sklearn.datasets", "torchvision", "torch._dynamo"]
        )
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # its children would die of Ctrl-C, and other tests' workers must not


def simplify(script, put=setattr):
    """No figures; no BatchNorm, with which an image's loss hangs on its batch; 120 images, an even number."""
    whole = common.prepare_data

    def prepare_data(args):
        data = whole(args)
        cut = {"test_x": data.test_x[:60], "test_y": data.test_y[:60]}
        return data._replace(train_x=data.train_x[:120], train_y=data.train_y[:120], **cut)

    put(common, "prepare_data", prepare_data)
    put(common, "save_figure", lambda path, figure: None)
    for name in ("BatchNorm1d", "BatchNorm2d"):
        put(nn, name, lambda d: nn.Identity())


def child(name, rank, port, argv, out, interrupt):
    """One rank, as torchrun would run it. Its model goes to out/METHOD.rankR.pt, its words to out/rankR.*."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(out / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    (out / f"rank{rank}.pid").write_text(f"{os.getpid()}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    if rank:  # only rank 0 writes
        os.replace = os.unlink = Path.unlink = Path.write_text = None
    script = sys.modules[name]
    simplify(script)
    measure, step, steps = script.measure, torch.optim.SGD.step, []

    def measured(model, data, run):
        torch.save(model.state_dict(), out / f"{run.title.split()[0]}.rank{rank}.pt")
        return measure(model, data, run)

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if (rank, len(steps)) == interrupt:  # torchrun hands Ctrl-C on to every rank
            for r in (1 - rank, rank):
                os.kill(int((out / f"rank{r}.pid").read_text()), signal.SIGINT)
            time.sleep(5)  # if this is rank 1: by now rank 0 waits for it
        return step(self, *args, **kwargs)

    script.measure, torch.optim.SGD.step = measured, interrupted
    sys.argv = [f"{name}.py", *argv]
    common.command_line(script.main)


def start(script, tmp_path, argv, interrupt=None):
    """Two ranks; when one ends badly the other is ended, as torchrun does. Their exit codes and stderr."""
    server = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*argv, "--out", str(tmp_path / "two"), "--precision", "fp32", "--device", "cpu"]
    ranks = []
    for rank in range(2):
        rest = (port, words, tmp_path, interrupt)
        ranks.append(server.Process(target=child, args=(script.__name__, rank, *rest)))
    for rank in ranks:
        rank.start()
    until = time.monotonic() + 100
    while any(rank.is_alive() for rank in ranks):
        failed = any(rank.exitcode for rank in ranks)
        if time.monotonic() > until or failed:
            time.sleep(1)
            for rank in ranks:
                rank.terminate()
        time.sleep(0.05)
    assert time.monotonic() < until, "hangs"
    return [rank.exitcode for rank in ranks], [(tmp_path / f"rank{r}.err").read_text() for r in (0, 1)]


def one(script, tmp_path, argv, monkeypatch):
    """The same in this process alone."""
    simplify(script, monkeypatch.setattr)
    script.main([*argv, "--out", str(tmp_path / "one"), "--precision", "fp32", "--device", "cpu"])


def files(out, method):
    """What a run computed: losses and accuracies by epoch, arrays, and the checkpoint."""
    (folder,) = [path.parent for path in out.rglob("result.json") if path.parent.parent.name == method]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in history:
        line.pop("seconds")
    with np.load(folder / "features.npz") as arrays:
        return history, dict(arrays), torch.load(folder / "checkpoint.pt", weights_only=True)


def same_on_both_ranks(tmp_path, method):
    ours, theirs = (torch.load(tmp_path / f"{method}.rank{r}.pt", weights_only=True) for r in (0, 1))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """together(script, methods, flags): the folder of one launch of two ranks, shared by the tests."""

    @functools.cache
    def launched(script, methods, flags):
        folder = tmp_path_factory.mktemp(script.__name__)
        codes, errors = start(script, folder, ["--method", *methods.split(), *flags.split(), *SHORT])
        assert codes == [0, 0] and errors == ["", ""]
        return folder

    return launched


@pytest.mark.parametrize("script, methods, flags", CASES)
def test_two_processes_take_the_steps_of_one(script, methods, flags, together, tmp_path, monkeypatch):
    """To the rounding of float32; mixed labels, crops and lam are those of one process."""
    two = together(script, methods, flags)
    one(script, tmp_path, ["--method", *methods.split(), *flags.split(), *SHORT], monkeypatch)
    for method in methods.split():
        (history, arrays, state), expected = files(two / "two", method), files(tmp_path / "one", method)
        torch.testing.assert_close(state["model"], expected[2]["model"], rtol=1e-3, atol=1e-5)
        assert torch.equal(state["generator"], expected[2]["generator"])
        losses = [line["loss"] for line in expected[0]]
        assert [line["loss"] for line in history] == pytest.approx(losses, rel=1e-4)
        assert arrays.keys() == expected[1].keys()
        for key in arrays:
            np.testing.assert_allclose(arrays[key], expected[1][key], rtol=1e-2, atol=1e-4)
        assert same_on_both_ranks(two, method)


@pytest.mark.parametrize("rank", [0, 1])
def test_interrupted_and_gone_on_with_is_the_same_to_the_last_bit(rank, together, tmp_path):
    """The second launch goes on with one method; of the other one rank 1 learns, too, that it is done."""
    script, methods, flags = CASES[rank]
    finished, method = methods.split()
    whole = together(script, methods, flags) / "two"
    rest = [*flags.split(), *SHORT]
    codes, errors = start(
        script, tmp_path, ["--method", method, *rest], interrupt=(rank, 5)
    )  # of 2 x 3 steps
    assert codes[rank] == 130 and "goes on" in errors[rank]
    done = Path(script.__name__, "digits", finished)
    shutil.copytree(whole / done, tmp_path / "two" / done)
    assert start(script, tmp_path, ["--method", finished, method, *rest])[0] == [0, 0]
    told = (tmp_path / "rank0.out").read_text()
    assert f"{finished} seed 0: finished before" in told and "goes on after epoch 1" in told
    assert (tmp_path / "rank1.out").read_text() == ""
    gone_on, expected = files(tmp_path / "two", method), files(whole, method)
    assert gone_on[0] == expected[0] and len(gone_on[0]) == 2
    assert all(np.array_equal(gone_on[1][key], expected[1][key]) for key in expected[1])
    torch.testing.assert_close(gone_on[2]["model"], expected[2]["model"], rtol=0, atol=0)


@pytest.mark.parametrize("flags, words", [
    ("--dataset digits --lr 1e18", ["not finite", "--lr", "checkpoint: none"]),
    ("--data-dir /dev/null --dataset mnist", ["/dev/null"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_no_hang(flags, words, tmp_path):
    codes, errors = start(bmls_msclf, tmp_path, ["--method", "ce", *flags.split()])
    assert codes == [2, -signal.SIGTERM] and errors[1] == ""
    assert errors[0].startswith("bmls_msclf.py: error: ") and errors[0].count("\n") == 1
    for word in words:
        assert word in errors[0]


def test_batch_too_small_for_the_processes(monkeypatch, user_error):
    monkeypatch.setattr(common, "ranks", lambda: (0, 2))
    with user_error("--batch-size 5", "6 or more"):
        bmls_msclf.main(["--batch-size", "5"])


PROGRAM = """
import sys, bmls_msclf, common
from test_distributed import SHORT, simplify
simplify(bmls_msclf)
sys.argv = ["bmls_msclf.py", "--method", "ce", "--seed", "0", "1", "--out", {out!r}, *SHORT]
common.command_line(bmls_msclf.main)
"""


def test_under_torchrun_itself(tmp_path):
    """Two seeds, one after the other; its processes come from the server, which has imported all."""
    (tmp_path / "program.py").write_text(PROGRAM.format(out=str(tmp_path)))
    words = ["--standalone", "--nproc-per-node", "2", "--run-path", "--start-method", "forkserver"]
    words += ["--redirects", "3", "--log-dir", str(tmp_path / "log"), str(tmp_path / "program.py")]
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        torch.distributed.run.main(words)
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    shown = {path.parent.name: path.read_text() for path in (tmp_path / "log").rglob("stdout.log")}
    assert shown["0"].count("training images (") == 1 and shown["1"] == ""  # rank 1 prints nothing
    assert len(list(tmp_path.rglob("result.json"))) == 2
