"""NC0 over the epochs by optimiser: who brings the class vectors' sum to 0?

    python results/optimisers.py runs/nc_metrics --figure results/nc_optimisers.png

Reads metrics.jsonl of every finished run of nc_metrics.py below the folder. For SGD it also prints what
weight decay alone predicts (derived here). Cross-entropy's gradient in W sums to 0 over the classes, so that
with momentum m, learning rates lr_t and weight decay lam, from the first epoch on,

    NC0(t) = NC0(1) exp(-2 sum_t lr_t lam / (1 - m))
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Run, command_line, curves, styles, table

NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


MOMENTUM = 0.9  # of nc_metrics.py's SGD


def predict(run: Run) -> list[tuple[int, float, float]]:
    """Epoch, measured and predicted NC0 of an SGD run, at every epoch that was measured."""
    flags = run.config["flags"]
    steps = -(-sum(run.finished["counts"]) // flags["batch_size"])  # of an epoch
    measured = {line["epoch"]: line["nc0"] for line in run.history if "nc0" in line}
    start = measured[1]
    decay = 0.0
    found = [(1, start, start)]
    for line in run.history[1:]:
        decay += steps * line["lr"] * flags["weight_decay"] / (1 - MOMENTUM)
        if line["epoch"] in measured:
            found.append((line["epoch"], measured[line["epoch"]], start * math.exp(-2 * decay)))
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folders of nc_metrics.py")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    runs = [Run(path.parent) for path in sorted(args.folder.rglob("result.json"))]
    by_name = {NAMES[run.config["flags"]["optimizer"]]: run for run in runs}
    points = {}
    rows = []
    for name in [name for name in NAMES.values() if name in by_name]:
        run = by_name[name]
        lines = [line for line in run.history if "nc0" in line]
        points[name] = [line["epoch"] for line in lines], [line["nc0"] for line in lines]
        cells = [run.finished[key] for key in ("nc0", "nc1", "nc2_equiangular_M", "nc3", "nc4")]
        rows.append([name, f"{100 * run.finished['accuracy']:.1f}", *(f"{value:.2g}" for value in cells)])
    print(table(["optimiser", "accuracy", "NC0", "NC1", "NC2", "NC3", "NC4"], rows))
    if "SGD" in by_name:
        found = predict(by_name["SGD"])
        worst = max(abs(theory / value - 1) for _, value, theory in found)
        _, value, theory = found[-1]
        print(f"SGD: NC0 {value:.2g} at the end, predicted {theory:.2g}; farthest apart: {100 * worst:.1f}%")
    axes = {"xlabel": "epoch", "ylabel": "NC0: |sum of class vectors|² / K"}
    curves(args.figure, points, styles(points), yscale="log", **axes)
    return {}


if __name__ == "__main__":
    command_line(main)
