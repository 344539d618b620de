"""Where the minority collapses in trained networks: draw cosine against class share, and print the edges.

    python results/collapse_map.py runs/map --figure results/collapse_map.png

Reads every finished run of bmls_msclf.py --profile step below the folder. x is the share of one rare class,
n_B / N; y the mean cosine of the rare half's class vectors after training, 1 where they have collapsed.
Dashed: the edge, where a method's cosine falls through 1/2, interpolated on the log of the share. In the
layer-peeled model Mixup's edge is 3/2 times cross-entropy's.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import COLOURS, Run, mean_pairwise_cosine, save_figure, table

NAMES = {"ce": "cross-entropy", "mixup": "Mixup", "bmls+ms": "BMLS + MS-Clf"}


def read(folder: Path) -> dict[tuple[float, str], np.ndarray]:
    """{(weight decay, method): (share, cosine) by share}, (n, 2) each; means over seeds."""
    found: dict = {}
    for path in sorted(folder.rglob("result.json")):
        run = Run(path.parent)
        counts = torch.tensor(run.finished["counts"])
        rare = torch.argsort(counts, stable=True)[: len(counts) // 2]
        W = torch.from_numpy(run.load_features()["W"])
        key = (run.config["flags"]["weight_decay"], run.name)
        share = float(counts[rare].double().mean() / counts.sum())
        found.setdefault(key, {}).setdefault(share, []).append(mean_pairwise_cosine(W, rare))
    return {
        key: np.array([(share, np.mean(cosines)) for share, cosines in sorted(points.items())])
        for key, points in sorted(found.items())
    }


def edge(points: np.ndarray, level: float = 0.5) -> float:
    """The share at which the cosine falls through `level`; nan where it does not."""
    share, cosine = points.T
    below = np.flatnonzero(cosine < level)
    if len(below) == 0 or below[0] == 0:
        return float("nan")
    i = below[0]
    weight = (cosine[i - 1] - level) / (cosine[i - 1] - cosine[i])
    return float(np.exp((1 - weight) * np.log(share[i - 1]) + weight * np.log(share[i])))


def draw(curves: dict, path: Path) -> None:
    """One panel per weight decay, one line per method."""
    from matplotlib.figure import Figure

    decays = sorted({decay for decay, _ in curves})
    methods = list(dict.fromkeys(method for _, method in curves))
    figure = Figure(figsize=(3.2 * len(decays) + 1.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(decays), sharey=True, squeeze=False)[0]
    for decay, panel in zip(decays, panels, strict=True):
        for i, method in enumerate(methods):
            if (decay, method) in curves:
                share, cosine = curves[decay, method].T
                panel.plot(
                    share, cosine, marker="os^Dv"[i], color=COLOURS[i], label=NAMES.get(method, method)
                )
                panel.axvline(edge(curves[decay, method]), color=COLOURS[i], ls="--", lw=1)
        panel.set(title=f"weight decay {decay:g}", xscale="log", xlabel="share of one rare class")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean cosine of the rare classes' vectors")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    save_figure(path, figure)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folders of bmls_msclf.py")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    curves = read(args.folder)
    rows = []
    for decay in sorted({decay for decay, _ in curves}):
        edges = [edge(curves[decay, method]) for method in ("ce", "mixup")]
        rows.append([f"{decay:g}", *(f"{value:.4f}" for value in edges), f"{edges[1] / edges[0]:.2f}"])
    text = table(["weight decay", "ce", "mixup", "mixup / ce"], rows)
    print(text)
    if args.figure:
        draw(curves, args.figure)
    return text


if __name__ == "__main__":
    main()
