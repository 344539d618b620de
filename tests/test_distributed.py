"""More than one process: bmls_msclf.py and etf_dr.py under torchrun compute what one process computes.

Two processes with gloo. They are forked from a server that has imported the scripts once, and get the
environment that torchrun would give them; one test goes through torchrun itself.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bmls_msclf
import common
import etf_dr

ROOT = Path(common.__file__).resolve().parent


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports once what each rank would import for itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.set_forkserver_preload(["test_distributed", "sklearn.datasets", "torchvision"])
        forkserver.ensure_running()


class Small(nn.Module):
    """A network that takes no time. Without BatchNorm, what an image gives does not depend on its batch."""

    batchnorm = False

    def __init__(self, channels, width):
        super().__init__()
        self.d = 64
        self.conv = nn.Conv2d(channels, 64, 3, padding=1)
        self.bn = nn.BatchNorm2d(64) if self.batchnorm else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))).mean((2, 3))


class SmallBatchNorm(Small):
    batchnorm = True


def simplify(script, network, put=setattr):
    """No large network, no figures; without BatchNorm, none before the class vectors either."""
    put(script, "ResNet32", network)
    put(script, "draw_figures", lambda folder, runs: [])
    if not network.batchnorm:
        put(nn, "BatchNorm1d", lambda d: nn.Identity())


def child(name, rank, port, network, argv, out, interrupt):
    """One rank, as torchrun would run it. Its models go to out/METHOD.rankR.pt, its words to out/rankR.*."""
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(out / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    (out / f"rank{rank}.pid").write_text(f"{os.getpid()}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    if rank:  # only rank 0 writes
        os.replace = os.unlink = Path.unlink = Path.write_text = None
    script = sys.modules[name]
    simplify(script, network)
    conclude, manual_seed, step, steps = script.conclude, torch.manual_seed, torch.optim.SGD.step, []

    def concluded(args, data, run, model, *rest):
        torch.save(model.state_dict(), out / f"{rest[-1]['method']}.rank{rank}.pt")
        return conclude(args, data, run, model, *rest)

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if (rank, len(steps)) == interrupt:  # torchrun hands Ctrl-C on to every rank
            for r in (1 - rank, rank):
                os.kill(int((out / f"rank{r}.pid").read_text()), signal.SIGINT)
            time.sleep(5)  # if this is rank 1: by now rank 0 waits for it
        return step(self, *args, **kwargs)

    script.conclude, torch.optim.SGD.step = concluded, interrupted
    torch.manual_seed = lambda seed: manual_seed(seed + 7 * rank)  # all must begin with rank 0's weights
    script.main(argv)


def start(script, tmp_path, argv, network=Small, interrupt=None):
    """Two ranks; when one fails the other is ended, as torchrun does. Their exit codes and stderr."""
    server = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    words = [*argv, "--out", str(tmp_path / "two"), "--precision", "fp32", "--device", "cpu"]
    for rank in range(2):
        rest = (port, network, words, tmp_path, interrupt)
        ranks.append(server.Process(target=child, args=(script.__name__, rank, *rest)))
    for rank in ranks:
        rank.start()
    until = time.monotonic() + 200
    while any(rank.is_alive() for rank in ranks):
        failed = any(rank.exitcode for rank in ranks)
        if time.monotonic() > until or (failed and not interrupt):
            for rank in ranks:
                rank.terminate()
        time.sleep(0.05)
    assert time.monotonic() < until, "hangs"
    return [rank.exitcode for rank in ranks], [(tmp_path / f"rank{r}.err").read_text() for r in (0, 1)]


def one(script, tmp_path, argv, monkeypatch, network=Small):
    """The same in this process alone."""
    simplify(script, network, monkeypatch.setattr)
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


@pytest.mark.parametrize("script, methods, flags", [
    (bmls_msclf, "mixup remix bmls+ms", "--lam batch --ms raw"),
    (bmls_msclf, "mixup cb+ms", "--lam pair --ms unit"),
    (etf_dr, "ce+mixup etf+dr etf+dr+mixup", "--class-length on --reweight on"),
])  # fmt: skip
def test_two_processes_take_the_steps_of_one(script, methods, flags, tmp_path, monkeypatch):
    """To the rounding of float32, in batches of 35: rank 0 has 17 images, rank 1 has 18."""
    argv = ["--method", *methods.split(), *flags.split(), "--batch-size", "35", "--dry-run"]
    codes, errors = start(script, tmp_path, argv)
    assert codes == [0, 0] and errors == ["", ""]
    one(script, tmp_path, argv, monkeypatch)
    for method in methods.split():
        (history, arrays, state), expected = (files(tmp_path / out, method) for out in ("two", "one"))
        for part in ("model", "optimizer"):  # after one step momentum is the gradient; there were two
            torch.testing.assert_close(state[part], expected[2][part], rtol=1e-4, atol=1e-6)
        assert torch.equal(state["generator"], expected[2]["generator"])
        assert history[0]["loss"] == pytest.approx(expected[0][0]["loss"], rel=1e-5)
        assert arrays.keys() == expected[1].keys()
        for key in arrays:  # features of all images in their order, though each rank computed half of them
            np.testing.assert_allclose(arrays[key], expected[1][key], rtol=1e-3, atol=1e-5)
        assert same_on_both_ranks(tmp_path, method)


def test_mixed_labels_are_those_of_one_process(tmp_path, monkeypatch):
    argv = ["--method", "bmls", "cb-mixup", "--epochs", "3", "--eval-every", "3", "--batch-size", "64"]
    assert start(bmls_msclf, tmp_path, argv, SmallBatchNorm)[0] == [0, 0]
    one(bmls_msclf, tmp_path, argv, monkeypatch, SmallBatchNorm)
    for method in ("bmls", "cb-mixup"):
        counts, expected = (files(tmp_path / out, method)[1]["mixed_counts"] for out in ("two", "one"))
        assert counts.sum() == 3 * 349 and np.array_equal(counts, expected)
        if method == "bmls":
            counts = (counts + np.tril(counts, -1).T)[np.triu_indices(10)]  # (i, j) and (j, i) are one label
            assert np.ptp(counts) == 1
        assert same_on_both_ranks(tmp_path, method)  # BatchNorm's statistics too


@pytest.mark.parametrize("script, method, rank", [(bmls_msclf, "bmls+ms", 0), (etf_dr, "etf+dr+mixup", 1)])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(script, method, rank, tmp_path):
    argv = ["--method", method, "--epochs", "3", "--eval-every", "1", "--batch-size", "64"]
    (whole := tmp_path / "whole").mkdir()
    assert start(script, whole, argv, SmallBatchNorm)[0] == [0, 0]
    codes, errors = start(script, tmp_path, argv, SmallBatchNorm, interrupt=(rank, 9))  # an epoch has 6 steps
    assert codes == [130, 130] and errors[1] == ""
    assert f"torchrun --nproc-per-node 2 {script.__name__}.py --method" in errors[0]
    assert errors[0].endswith("--resume\n")
    codes, errors = start(script, tmp_path, argv, SmallBatchNorm)  # not silently on: rank 0 alone sees it
    assert codes == [2, -signal.SIGTERM] and "--resume" in errors[0]
    assert errors[0].count("\n") == 1 and errors[1] == ""
    assert start(script, tmp_path, [*argv, "--resume"], SmallBatchNorm)[0] == [0, 0]
    resumed, expected = files(tmp_path / "two", method), files(whole / "two", method)
    assert resumed[0] == expected[0] and len(resumed[0]) == 3
    assert all(np.array_equal(resumed[1][key], expected[1][key]) for key in expected[1])
    torch.testing.assert_close(resumed[2]["model"], expected[2]["model"], rtol=0, atol=0)
    assert (tmp_path / "rank1.out").read_text() == "" != (tmp_path / "rank0.out").read_text()
    assert start(script, tmp_path, argv, SmallBatchNorm)[0] == [0, 0]  # rank 1 hears that all is done
    assert "done before" in (tmp_path / "rank0.out").read_text()


@pytest.mark.parametrize("script, flags, words", [
    (bmls_msclf, "--batch-size 3", ["--batch-size 3", "2 processes", "4 or more"]),
    (bmls_msclf, "--jobs 2", ["--jobs 2", "torchrun"]),
    (etf_dr, "--lr 1e30 --reweight on", ["not finite", "--lr", "checkpoint.pt"]),
    (etf_dr, "--data-dir /dev/null --dataset mnist", ["/dev/null"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_no_hang(script, flags, words, tmp_path):
    codes, errors = start(script, tmp_path, ["--method", "ce", *flags.split()])
    assert codes == [2, -signal.SIGTERM] and errors[1] == ""
    assert errors[0].startswith(f"{script.__name__}.py: error: ") and errors[0].count("\n") == 1
    for word in words:
        assert word in errors[0]


PROGRAM = """
import bmls_msclf
from test_distributed import Small, simplify
simplify(bmls_msclf, Small)
bmls_msclf.main(["--method", "ce", "--seed", "0", "1", "--dry-run", "--out", {out!r}])
bmls_msclf.main(["--epochs", "0"])
"""


def test_under_torchrun_itself(tmp_path):
    """Two seeds, one after the other; then a mistake."""
    (tmp_path / "program.py").write_text(PROGRAM.format(out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    argv = [*launch, str(tmp_path / "program.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.count("349 training images") == 1  # rank 1 prints nothing
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: --" in line]
    assert errors == ["bmls_msclf.py: error: --epochs 0: expected 1 or more"]
