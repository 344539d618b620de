"""What all tests share: the scripts' folder on the path, one thread, and what a user's mistake looks like."""

import contextlib
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
