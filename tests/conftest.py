"""What all tests share: the scripts' folder on the path, one thread, and what a user's mistake looks like."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, and sums stay the same
os.environ["OMP_NUM_THREADS"] = "1"  # and in what the tests start

# Where the tests run in a shell's background, Ctrl-C is ignored, and what they start would ignore it too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no bug (no deadline), and a test that failed once must fail again (derandomized).
hypothesis.settings.register_profile("here", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def user_error():
    """`with user_error("--flag", path): ...` expects a UserError: one line that holds each of the words."""
    from common import UserError

    @contextlib.contextmanager
    def expect(*words):
        with pytest.raises(UserError) as caught:
            yield
        text = str(caught.value)
        assert "\n" not in text
        for word in words:
            assert str(word) in text

    return expect


@pytest.fixture
def no_figures(monkeypatch):
    """For tests of anything else: figures take longer than these small runs; the dry runs draw them."""
    monkeypatch.setattr("common.save_figure", lambda *_: None)


@pytest.fixture(scope="session")
def run_until_killed():
    """run_until_killed(main, argv, kind, n): main(argv) in a copy of this process that ends as by kill -9.

    kind "step": at the n-th step of an optimiser; "save": when a checkpoint is renamed for the n-th time.
    """

    def counting(function, counts, n):
        calls = 0

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += counts(args)
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    def die(main, argv, kind, n):
        if kind == "step":
            torch.optim.Optimizer.zero_grad = counting(torch.optim.Optimizer.zero_grad, lambda _: 1, n)
        else:
            os.replace = counting(os.replace, lambda args: str(args[1]).endswith("checkpoint.pt"), n)
        main(argv)

    def run(main, argv, kind, n):
        child = multiprocessing.get_context("fork").Process(target=die, args=(main, argv, kind, n))
        child.start()
        child.join(120)
        exitcode = child.exitcode
        child.kill()
        assert exitcode == -signal.SIGKILL

    return run
