"""More than one process: bmls_msclf.py and etf_dr.py under torchrun compute what one process computes.

Two processes with gloo. They are forked from a server that has imported the scripts once, and get the
environment that torchrun would give them; one test goes through torchrun itself.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing import connection, forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
    imports = ["test_distributed", "sklearn.datasets", "torchvision", "torch._dynamo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.set_forkserver_preload(imports)
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # its children would die of Ctrl-C, and other tests' workers must not


def simplify(put):
    """No figures; no BatchNorm, with which an image's loss hangs on its batch; 120 images, an even number."""
    arrays = {name: values[:120] for name, values in common._read_digits().items()}
    put(common, "_read_digits", lambda: arrays)
    put(common, "save_figure", lambda path, figure: None)
    put(nn, "BatchNorm1d", lambda d: nn.Identity())
    put(nn, "BatchNorm2d", lambda d: nn.Identity())


def child(name, rank, port, argv, out, interrupt):
    """One rank, as torchrun would run it; what it prints goes to out/rankR.out and .err."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(out / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    if rank:  # only rank 0 writes
        os.replace = os.unlink = Path.unlink = Path.write_text = None
    torch.set_num_threads(1)
    simplify(setattr)
    steps = []

    def count(*_):
        steps.append(1)
        if (rank, len(steps)) == interrupt:
            raise KeyboardInterrupt

    register_optimizer_step_pre_hook(count)
    sys.argv = [f"{name}.py", *argv]
    common.command_line(sys.modules[name].main)


def start(script, tmp_path, argv, interrupt=None):
    """Two ranks; when one ends badly the other is ended, as torchrun does. Their exit codes and stderr."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*argv, "--out", str(tmp_path / "two"), "--precision", "fp32", "--device", "cpu"]
    rest = (port, words, tmp_path, interrupt)
    process = multiprocessing.get_context("forkserver").Process
    ranks = [process(target=child, args=(script.__name__, rank, *rest)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    connection.wait([rank.sentinel for rank in ranks], 100)
    if any(rank.exitcode for rank in ranks):
        time.sleep(1)
        [rank.terminate() for rank in ranks]
    [rank.join(100) for rank in ranks]
    codes = [rank.exitcode for rank in ranks]  # None: hangs
    [rank.kill() for rank in ranks]
    return codes, [(tmp_path / f"rank{r}.err").read_text() for r in (0, 1)]


def files(out, method):
    """What a run computed: losses and accuracies by epoch, arrays, and the checkpoint."""
    (folder,) = [path.parent for path in out.rglob("result.json") if path.parent.parent.name == method]
    run = common.Run(folder)
    history = [{**line, "seconds": 0} for line in run.history]
    return history, run.load_features(), torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0].__name__)
def together(request, tmp_path_factory):
    """One launch of two ranks, shared by the tests: its script, its methods, its flags and its folder."""
    script, methods, flags = request.param
    folder = tmp_path_factory.mktemp(script.__name__)
    codes, errors = start(script, folder, ["--method", *methods.split(), *flags.split(), *SHORT])
    assert codes == [0, 0] and errors == ["", ""]
    return script, methods.split(), [*flags.split(), *SHORT], folder / "two"


def test_two_processes_take_the_steps_of_one(together, tmp_path, monkeypatch):
    """To the rounding of float32; mixed labels, crops and lam are those of one process."""
    script, methods, flags, two = together
    simplify(monkeypatch.setattr)
    words = ["--out", str(tmp_path), "--precision", "fp32", "--device", "cpu"]
    script.main(["--method", *methods, *flags, *words])
    for method in methods:
        (history, arrays, state), expected = files(two, method), files(tmp_path, method)
        torch.testing.assert_close(state["model"], expected[2]["model"], rtol=1e-3, atol=1e-5)
        assert torch.equal(state["generator"], expected[2]["generator"])
        losses = [line["loss"] for line in expected[0]]
        assert [line["loss"] for line in history] == pytest.approx(losses, rel=1e-4)
        for key in expected[1]:
            np.testing.assert_allclose(arrays[key], expected[1][key], rtol=1e-2, atol=1e-4)


def test_interrupted_and_gone_on_with_is_the_same_to_the_last_bit(together, tmp_path):
    """Ctrl-C reaches one rank first. Of the method that is already there, rank 1 learns that it is done."""
    (script, (finished, method), flags, whole), rank = together, int(together[0] is etf_dr)
    codes, errors = start(script, tmp_path, ["--method", method, *flags], (rank, 5))  # of 2 x 3 steps
    assert codes[rank] == 130 and "goes on" in errors[rank]
    done = Path(script.__name__, "digits", finished)
    shutil.copytree(whole / done, tmp_path / "two" / done)
    assert start(script, tmp_path, ["--method", finished, method, *flags])[0] == [0, 0]
    told = (tmp_path / "rank0.out").read_text()
    assert f"{finished} seed 0: finished before" in told and "goes on after epoch 1" in told
    gone_on, expected = files(tmp_path / "two", method), files(whole, method)
    assert gone_on[0] == expected[0] and len(gone_on[0]) == 2
    assert all(np.array_equal(gone_on[1][key], expected[1][key]) for key in expected[1])
    torch.testing.assert_close(gone_on[2]["model"], expected[2]["model"], rtol=0, atol=0)


@pytest.mark.parametrize("flags, word", [
    ("--dataset digits --lr 1e18", "not finite"), ("--data-dir /dev/null --dataset mnist", "/dev/null"),
])  # fmt: skip
def test_bad_input_is_one_line_and_no_hang(flags, word, tmp_path):
    codes, errors = start(bmls_msclf, tmp_path, ["--method", "ce", *flags.split()])
    assert codes == [2, -signal.SIGTERM] and errors[1] == ""
    assert errors[0].startswith("bmls_msclf.py: error: ") and errors[0].count("\n") == 1
    assert word in errors[0]


def test_under_torchrun_itself(tmp_path):
    """Two seeds, one after the other; its processes come from the server, which has imported all."""
    words = ["--standalone", "--nproc-per-node", "2", "--start-method", "forkserver", "--redirects", "3"]
    words += ["--log-dir", str(tmp_path / "log"), "--run-path", str(ROOT / "bmls_msclf.py")]
    words += ["--dry-run", "--method", "ce", "--seed", "0", "1", "--out", str(tmp_path)]
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    torch.distributed.run.main(words)
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    shown = {path.parent.name: path.read_text() for path in (tmp_path / "log").rglob("stdout.log")}
    assert shown["0"].count("training images (") == 1 and shown["1"] == ""  # rank 1 prints nothing
    assert len(list(tmp_path.rglob("result.json"))) == 2
