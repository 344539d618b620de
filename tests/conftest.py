"""Tests import the scripts from the repository root, and run on one thread so that they repeat to the bit."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
