"""Figures drawn from several runs, one function each; nothing is trained.

    python results/figures.py collapse_map runs/map --figure results/collapse_map.png
    python results/figures.py minority_cosine runs/bmls_msclf/digitslt --figure results/minority_cosine.png
    python results/figures.py optimisers runs/nc_metrics --figure results/nc_optimisers.png
    python results/figures.py three_collapses ANGLES STREAM RARE --figure results/three_collapses.png

Every finished run below the folders is drawn; what belongs to other data or another setting than the first is
refused. ANGLES, STREAM, RARE: a run each of `spherization.py --method plain-3d`, `fno_continual.py --method
sgd` (sgd-learnable), `bmls_msclf.py --method mixup`, all on digits.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bmls_msclf
import common
from common import COLOURS, MARKERS, Run, UserError


def read_runs(folders: list[Path]) -> list[Run]:
    """Every finished run below the folders, in the order of the folders. UserError if there is none."""
    files = [file for folder in folders for file in sorted(folder.rglob("result.json"))]
    if not files:
        raise UserError(f"{' '.join(map(str, folders))}: no finished run below it")
    return [Run(file.parent) for file in files]


def compare(runs: list[Run], *free: str, keys: list[str] | None = None) -> None:
    """Raises UserError where a run's setting is not the first one's; free: flags that the figure compares."""
    first = runs[0].config["setting"]
    seen = {}
    for run in runs:
        setting = run.config["setting"]
        for key in keys or sorted(first.keys() | setting.keys()):
            if key not in free and setting.get(key) != first.get(key):
                there = f"{first.get(key)} in {runs[0].folder}"
                raise UserError(f"{run.folder}: {key} is {setting.get(key)}, but {there}; give one setting")
        job = (run.name, run.config["seed"], *(str(setting.get(key)) for key in free))
        if job in seen:
            raise UserError(
                f"{run.folder}: the same method, seed and setting as {seen[job]}; give one of them"
            )
        seen[job] = run.folder


def methods_of(runs: list[Run]) -> dict[str, str]:
    """{method: its name in words}, of bmls_msclf.py's runs, in the order of its METHODS."""
    names = {run.name for run in runs}
    if not names <= bmls_msclf.ABOUT.keys():
        raise UserError(f"{runs[0].folder.parent}: expected runs of bmls_msclf.py")
    return {name: about.partition(":")[0] for name, about in bmls_msclf.ABOUT.items() if name in names}


def edge(share: list[float], cosine: list[float], level: float = 0.5) -> float:
    """The share at which the cosine first falls through `level`, on the log of the share; nan: nowhere."""
    points = list(zip(share, cosine, strict=True))
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if y >= level > next_y:
            return x * (next_x / x) ** ((y - level) / (y - next_y))
    return math.nan


def collapse_map(runs: list[Run], path: Path) -> None:
    """Where does minority collapse begin? Cosine of the rare half's class vectors by class size."""
    compare(runs, "imbalance")
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot = figure.subplots()
    edges = {}
    sizes = {}  # share of the images -> images
    for name, title in methods_of(runs).items():
        cosines = {}
        for run in (run for run in runs if run.name == name):
            n = torch.tensor(run.finished["counts"])
            rare = n.argsort(stable=True)[: len(n) // 2]
            share = float(n[rare].double().mean() / n.sum())
            W = torch.from_numpy(run.load_features()["W"])
            cosines.setdefault(share, []).append(common.mean_pairwise_cosine(W, rare))
            sizes[share] = int(n.min())
        shares = sorted(cosines)
        means = [np.mean(cosines[share]) for share in shares]
        style = common.styles([name])[name]
        plot.plot(shares, means, label=title, **style)
        edges[name] = edge(shares, means)
        plot.axvline(edges[name], color=style["color"], ls="--", lw=1)
        print(f"{title}: the cosine falls through 1/2 at a share of {edges[name]:.4f}")
    ratio = edges.get("mixup", math.nan) / edges.get("ce", math.nan)
    if ratio > 1:
        middle = math.sqrt(edges["ce"] * edges["mixup"])
        plot.text(middle, 1.02, f"x {ratio:.1f}", ha="center")
    plot.set(xscale="log", title="How small must a class be to collapse?")
    plot.set_xticks(list(sizes), [str(n) for n in sizes.values()], fontsize="small")
    plot.set_xticks([], minor=True)
    plot.set(xlabel=r"$n_B$, images of one rare class (at its share of all images)")
    plot.set(ylabel="cosine of rare class vectors (1: collapse)", ylim=(-0.2, 1.12))
    figure.legend(loc="outside right upper", frameon=False)
    common.save_figure(path, figure)


def minority_cosine(runs: list[Run], path: Path) -> None:
    """When do the rare classes' vectors fall together? Their mean cosine over the epochs, mean over seeds."""
    compare(runs)
    methods = methods_of(runs)
    if len(methods) > 4:
        raise UserError(f"{len(methods)} methods, {' '.join(methods)}: four can be told apart; give fewer")
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot = figure.subplots()
    ends = {}
    for name in methods:
        lines = [[line for line in run.history if "accuracy" in line] for run in runs if run.name == name]
        epochs = [line["epoch"] for line in lines[0]]
        cosines = np.mean([[line["minority_cosine_W"] for line in of_seed] for of_seed in lines], axis=0)
        plot.plot(epochs, cosines, markevery=max(1, len(epochs) // 10), **common.styles([name])[name])
        ends[name] = cosines[-1]
    place = -2.0
    for name in sorted(ends, key=ends.get):  # at the end of its line, or above the one below it
        place = max(ends[name], place + 0.08)
        at = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        plot.annotate(methods[name], (epochs[-1], place), color=common.styles([name])[name]["color"], **at)
    plot.axhline(1, color="0.6", lw=1)
    plot.spines[["top", "right"]].set_visible(False)
    plot.set(title="Do rare classes end with one class vector?", xlabel="epoch", ylim=(None, 1.05))
    plot.set(ylabel="cosine of rare class vectors (1: collapse)")
    common.save_figure(path, figure)


def predict_nc0(run: Run, epochs: list[int], measured: list[float]) -> np.ndarray:
    """NC0 of an SGD run from the first measured epoch on, if nothing but weight decay changes it.

    Cross-entropy's gradient in W sums to 0 over the classes, so that their sum s follows s <- s - lr v,
    v <- m v + lam s, with momentum m, learning rate lr and weight decay lam: it decays, and nothing else.
    """
    setting = run.config["setting"]
    s, v = 1.0, 0.0
    sums = []
    for line in run.history:
        for _ in range(-(-sum(run.finished["counts"]) // setting["batch_size"])):  # steps of an epoch
            v = 0.9 * v + setting["weight_decay"] * s
            s -= line["lr"] * v
        sums.append(s)
    predicted = measured[0] * np.square([sums[epoch - 1] / sums[epochs[0] - 1] for epoch in epochs])
    print(f"SGD: NC0 {measured[-1]:.2g} at the end, predicted {predicted[-1]:.2g}")
    return predicted


def optimisers(runs: list[Run], path: Path) -> None:
    """Which optimiser brings the class vectors' sum to 0? NC0 over the epochs, and SGD's by theory."""
    compare(runs, "optimizer", "lr")
    lines = {}
    style = {}
    for i, (key, title) in enumerate({"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}.items()):
        for run in [run for run in runs if run.config["setting"].get("optimizer") == key][:1]:
            tested = [line for line in run.history if "nc0" in line]
            lines[title] = [line["epoch"] for line in tested], [line["nc0"] for line in tested]
            style[title] = {"color": COLOURS[i], "marker": MARKERS[i]}
            if key == "sgd":
                lines["SGD, predicted"] = lines[title][0], predict_nc0(run, *lines[title])
                style["SGD, predicted"] = {"color": "black", "ls": ":", "zorder": 3}
    axes = {"xlabel": "epoch", "ylabel": "NC0: |sum of class vectors|² / K", "yscale": "log"}
    common.curves(path, lines, style, title="Which optimiser brings the class vectors' sum to 0?", **axes)


def mean_features(run: Run, centre: bool) -> torch.Tensor:
    """Mean test feature of each class, (K, d); centre: about the mean of all."""
    kept = run.load_features()
    h = torch.from_numpy(kept["test_h"])
    return common.class_means(h - h.mean(0) * centre, torch.from_numpy(kept["test_y"]), len(kept["W"]))


def by_direction(M: torch.Tensor) -> list[int]:
    """The classes of means M (K, d), those of nearly one direction side by side."""
    return leaves_list(linkage(common.unit(M).nan_to_num(), "average")).tolist()


def by_new_class(M: torch.Tensor, tasks: int) -> list[int]:
    """The classes of the last of the tasks, each after the old ones whose means M (K, d) lie on it."""
    new = (common.split_tasks(len(M), tasks).diff().nonzero().max() + 1).item()
    nearest = new + common.cosines(M)[:new, new:].argmax(1)
    return [k for j in range(new, len(M)) for k in [*(nearest == j).nonzero().flatten().tolist(), j]]


def three_collapses(runs: list[Run], path: Path) -> None:
    """The three collapses in one picture: cosines, red where two things have become one."""
    if len(runs) != 3:
        raise UserError(f"{len(runs)} runs: expected three, ANGLES STREAM RARE")
    compare(runs, keys=["data"])
    angles, stream, rare = runs
    of_angles = mean_features(angles, centre=False)
    of_stream = mean_features(stream, centre=True)
    W = torch.from_numpy(rare.load_features()["W"])
    tasks = stream.config["setting"]["tasks"]
    most_first = np.argsort(-np.array(rare.finished["counts"]), kind="stable").tolist()
    panels = {
        "Intra-class: only length tells\nsome classes apart": (of_angles, by_direction(of_angles)),
        "Inter-class: old features fall\nonto the new classes'": (of_stream, by_new_class(of_stream, tasks)),
        "Minority: rare classes share\none class vector": (W, most_first),
    }
    labels = ["mean features", "mean features, each new class last", "class vectors, rare last"]
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    for plot, label, (title, (vectors, order)) in zip(
        figure.subplots(1, 3), labels, panels.items(), strict=True
    ):
        C = common.cosines(vectors[order]).fill_diagonal_(math.nan).numpy()
        image = plot.imshow(C, cmap="RdBu_r", vmin=-1, vmax=1)
        plot.set(title=title, xlabel=label, facecolor="0.85")
        plot.set_xticks(range(len(order)), order)
        plot.set_yticks(range(len(order)), order)
    figure.colorbar(image, ax=figure.axes, label="cosine", shrink=0.8)
    common.save_figure(path, figure)


FIGURES = {draw.__name__: draw for draw in (collapse_map, minority_cosine, optimisers, three_collapses)}


def main(argv: list[str] | None = None) -> dict:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("name", choices=list(FIGURES))
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    FIGURES[args.name](read_runs(args.folders), args.figure)
    return {}


if __name__ == "__main__":
    common.command_line(main)
