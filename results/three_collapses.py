"""The three collapses in one picture: cosines, red where two things have become one.

    python results/three_collapses.py JOINT STREAM RARE --figure results/three_collapses.png

JOINT and STREAM are runs of `fno_continual.py --method joint sgd` (joint-learnable/seed0 and
sgd-learnable/seed0), RARE is one of `bmls_msclf.py --method mixup` (mixup/seed0), all on digits. Left and
middle: cosines between test features, a dozen of each class, about the mean of all. Right: cosines between
class vectors. Reads features.npz, trains nothing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Run, command_line, cosines, save_figure

PER_CLASS = 12


def feature_cosines(run: Run) -> np.ndarray:
    """Cosines between test features, PER_CLASS of each class in class order, about the mean of them all."""
    kept = run.load_features()
    h, y = kept["test_h"], kept["test_y"]
    rows = np.concatenate([np.flatnonzero(y == k)[:PER_CLASS] for k in range(y.max() + 1)])
    return cosines(torch.from_numpy(h[rows] - h.mean(0))).numpy()


def class_vector_cosines(run: Run) -> np.ndarray:
    """Cosines between class vectors, the largest class first; without the diagonal, which is always 1."""
    order = np.argsort(-np.array(run.finished["counts"]), kind="stable")
    C = cosines(torch.from_numpy(run.load_features()["W"][order])).numpy()
    np.fill_diagonal(C, np.nan)
    return C


def draw(joint: Run, stream: Run, rare: Run, path: Path) -> None:
    """Three square maps side by side with one colour bar."""
    from matplotlib.figure import Figure

    maps = [
        (
            feature_cosines(joint),
            "Intra-class: a class\nshrinks to one point",
            "test features, class by class",
        ),
        (
            feature_cosines(stream),
            "Inter-class: old classes fall\nonto the two newest",
            "test features, old to new",
        ),
        (
            class_vector_cosines(rare),
            "Minority: rare classes share\none class vector",
            "class vectors, common to rare",
        ),
    ]
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, (C, title, label) in zip(panels, maps, strict=True):
        classes = len(C) // PER_CLASS or len(C)
        # features and class vectors alike: K classes along each side, class k from k - 1/2 to k + 1/2
        edge = classes - 0.5
        image = panel.imshow(C, cmap="RdBu_r", vmin=-1, vmax=1, extent=(-0.5, edge, edge, -0.5))
        panel.set(title=title, xlabel=label, xticks=range(classes), yticks=range(classes))
    figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
    save_figure(path, figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("joint", "stream", "rare"):
        parser.add_argument(name, type=Path, help="folder of a finished run")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    draw(Run(args.joint), Run(args.stream), Run(args.rare), args.figure)
    return {}


if __name__ == "__main__":
    command_line(main)
