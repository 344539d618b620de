"""Heads, features, or speed: what does each remedy of a long tail improve? One table across the chapters.

    python results/remedies.py runs/remedies --seed 0 1 2 --figure results/remedies.png
    python results/remedies.py runs/remedies --seed 0 1 2 --epochs 10 30 60 --figure results/speed.png

Trains seven methods with the same network, images, schedule and budget; the same command goes on where it
stopped. The first seed is trained with every weight decay of the grid. The one whose own head is right on
most held-out images, a tenth of each class set aside before the long tail is cut, is kept for the other seeds
and lengths. No test image chooses anything.

Two judges look at frozen features instead of heads. Both are logistic regressions of scikit-learn on
standardised features, C chosen on the held-out images:

    probe   on all training images, also those that the long tail left out: what do the features know?
    cRT     class-balanced, on the long-tailed ones: what is a new head worth? (Kang et al. 2020)

Features of all images come from checkpoint.pt. They and both judgements are kept in the run's remedies.npz.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bmls_msclf
import common
import etf_dr
import hug
from common import UserError, mean_std, table


class Method(NamedTuple):
    script: ModuleType
    name: str  # of the script's method
    softmax: bool  # logit adjustment has no meaning where logits are cosines


METHODS = {
    "cross-entropy": Method(bmls_msclf, "ce", True),
    "balanced softmax": Method(bmls_msclf, "balanced-softmax", True),
    "class-balanced": Method(bmls_msclf, "cb", True),
    "Mixup": Method(bmls_msclf, "mixup", True),
    "BMLS + MS-Clf": Method(bmls_msclf, "bmls+ms", True),
    "ETF + DR": Method(etf_dr, "etf+dr", False),
    "HUG": Method(hug, "hug-mhe", False),
}
DECAYS = ("5e-5", "2e-4", "1e-3", "5e-3")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the judges
FIRST = {"own": "own head", "cRT": "cRT", "probe": "probe"}  # judge: its title
SECOND = {name: common.HEADS[name] for name in ("logit_adjustment", "tau_normalisation", "nearest_mean")}


def hold_out(base: str, data_dir: Path, folder: Path) -> int:
    """Write FOLDER/BASE.npz with a tenth of each class's training images behind the test images.

    Returns how many those are. The scripts then train without them and keep the features of both.
    """
    data = common.load_dataset(base, data_dir)
    place = torch.zeros(len(data.train_y), dtype=torch.long)  # of an image within its class
    for k in range(len(data.classes)):
        members = data.train_y == k
        place[members] = torch.arange(int(members.sum()))
    held_out = place % 10 == 0
    arrays = {
        "train_x": data.train_x[~held_out],
        "train_y": data.train_y[~held_out],
        "test_x": torch.cat([data.test_x, data.train_x[held_out]]),
        "test_y": torch.cat([data.test_y, data.train_y[held_out]]),
    }
    arrays = {key: value.numpy() for key, value in arrays.items()}
    # Written anew each time, so that runs of other data are refused and not gone on with
    classes = np.array(data.classes)
    common.write_atomically(folder / f"{base}.npz", lambda part: np.savez(part, **arrays, classes=classes))
    return int(held_out.sum())


def train(args: argparse.Namespace, epochs: int, decay: str, names: list[str], seeds: list[int]) -> None:
    """The methods `names` with these seeds, into FOLDER/epochsE/wdDECAY; what is finished stays."""
    for script in dict.fromkeys(METHODS[name].script for name in names):
        methods = [METHODS[name].name for name in names if METHODS[name].script is script]
        flags = ["--dataset", f"{args.dataset}lt", "--net", "cnn", "--batch-size", "128", "--lr", "0.1"]
        flags += ["--epochs", str(epochs), "--eval-every", "20", "--precision", args.precision]
        flags += ["--weight-decay", decay, "--method", *methods, "--seed", *map(str, seeds)]
        flags += ["--data-dir", str(args.folder / "data")]
        flags += ["--out", str(args.folder / f"epochs{epochs}" / f"wd{decay}")]
        with contextlib.redirect_stdout(sys.stderr):  # the tables of this file stand alone on stdout
            script.main([*flags, "--schedule", "steps"] if script is hug else flags)


def read(args: argparse.Namespace, epochs: int, decay: str, name: str, seed: int) -> common.Run:
    """The run of one method, finished or not."""
    script = Path(METHODS[name].script.__file__).stem
    place = args.folder / f"epochs{epochs}" / f"wd{decay}" / script / f"{args.dataset}lt"
    return common.Run(place / METHODS[name].name / f"seed{seed}")


def choose(args: argparse.Namespace, held_out: int) -> dict[str, str]:
    """{method: weight decay} whose own head, of the first seed, is right on most held-out images."""
    chosen = {}
    rows = []
    for name in args.method:
        on_held_out = {}
        cells = dict.fromkeys(args.weight_decay, "-")
        for decay in args.weight_decay:
            run = read(args, max(args.epochs), decay, name, args.seed[0])
            if run.finished:
                kept = run.load_features()
                right = (kept["test_h"] @ kept["W"].T).argmax(1) == kept["test_y"]
                on_held_out[decay] = right[-held_out:].mean()
                cells[decay] = f"{100 * right[-held_out:].mean():.1f} ({100 * right[:-held_out].mean():.1f})"
        rows.append([name, *cells.values()])
        if on_held_out:
            chosen[name] = max(on_held_out, key=on_held_out.get)
    print(f"\nOwn heads, % of held-out (and test) images by weight decay, seed {args.seed[0]}:")
    print(table(["trained with", *args.weight_decay], rows))
    return chosen


# %% The judges


def fit(h: np.ndarray, y: np.ndarray, held_h, held_y, class_weight: str | None = None) -> Pipeline:
    """Logistic regression of y (N,) on standardised h (N, d); C is right on most of the held-out images."""
    found = []
    for C in STRENGTHS:
        regression = LogisticRegression(C=C, class_weight=class_weight, max_iter=300)
        found.append(make_pipeline(StandardScaler(), regression).fit(h, y))
    return max(found, key=lambda judge: judge.score(held_h, held_y))


def embed_all(run: common.Run, method: Method, data: common.Dataset) -> np.ndarray:
    """Features (N, d) of all training images, by checkpoint.pt: also of those that the long tail left out."""
    setting = run.config.get("setting") or run.config["flags"]  # as older runs have it
    run.device = common.pick_device("auto")
    half = {"dtype": torch.bfloat16, "enabled": setting["precision"] == "bf16"}
    run.autocast = functools.partial(torch.autocast, run.device.type, **half)
    model = method.script.build_model(argparse.Namespace(**setting), method.name, data)
    file = run.folder / "checkpoint.pt"
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: does not fit this version of the script ({reason}); train anew") from None
    model = model.to(run.device, memory_format=torch.channels_last)
    return method.script.embed(model, data.train_x, data, run)[0].cpu().numpy()


def judge(run: common.Run, method: Method, data: common.Dataset, held_out: int) -> dict[str, np.ndarray]:
    """What remedies.npz keeps: h, features of all training images; predictions of test images by judge."""
    kept = run.load_features()
    file = run.folder / "remedies.npz"
    tail = common.long_tail_subset(data.train_y, len(data.classes), 100, by_count=False)

    def fits(h: np.ndarray | None) -> bool:  # is it by the network that features.npz is of?
        if h is None or not np.array_equal(data.train_y[tail], kept["train_y"]):
            return False
        return np.abs(h[tail] - kept["train_h"]).mean() < 0.02 * kept["train_h"].std()

    known = dict(np.load(file)) if file.exists() else {}
    if fits(known.get("h")):
        return known
    h = embed_all(run, method, data)
    if not fits(h):
        raise UserError(f"{run.folder}: its checkpoint does not give its features.npz; train it anew")
    held = kept["test_h"][-held_out:], kept["test_y"][-held_out:]
    test_h = kept["test_h"][:-held_out]
    probe = fit(h, data.train_y.numpy(), *held).predict(test_h)
    cRT = fit(kept["train_h"], kept["train_y"], *held, class_weight="balanced").predict(test_h)
    common.write_atomically(file, lambda part: np.savez(part, h=h, probe=probe, cRT=cRT))
    return {"h": h, "probe": probe, "cRT": cRT}


def measure(run: common.Run, method: Method, data: common.Dataset, held_out: int) -> dict[str, float]:
    """Test accuracy by head and judge, of the three rarest classes of ten as JUDGE_rare; and the rest."""
    kept = {key: torch.from_numpy(value) for key, value in run.load_features().items()}
    train = kept["train_h"], kept["train_y"]
    W = kept["W"]
    n = torch.bincount(train[1], minlength=len(W))
    largest = n.sort().values[len(W) * 3 // 10 - 1]
    rare = (n <= largest).nonzero().flatten()  # classes of one size stay together
    test_h = kept["test_h"][:-held_out]
    test_y = kept["test_y"][:-held_out]
    judged = judge(run, method, data, held_out)
    result = {"train": run.finished["train_accuracy"], "cosine": common.mean_pairwise_cosine(W, rare)}
    every = torch.ones(len(test_y), dtype=torch.bool)
    for end, where in (("", every), ("_rare", torch.isin(test_y, rare))):
        of_heads = common.heads(*train, test_h[where], test_y[where], W, softmax=method.softmax)
        result |= {f"{name}{end}": value for name, value in of_heads.items()}
        for name in ("probe", "cRT"):
            right = judged[name][where] == test_y[where].numpy()
            result[f"{name}{end}"] = float(right.mean())
    return result


# %% Tables and figure


def percent(seeds: list[dict], name: str) -> str:
    """`58.1 (25.4)`: of all test images and, in brackets, of the rarest classes'; - where it is undefined."""
    cells = [mean_std([seed[key] for seed in seeds], 1, 100) for key in (name, f"{name}_rare")]
    return "-" if cells[0] == "-" else f"{cells[0]} ({cells[1]})"


def print_tables(found: dict[str, dict[int, list[dict]]], chosen: dict[str, str], last: int) -> None:
    """found: {method: {epochs: measurements by seed}}."""
    rows = []
    more = []
    for name, by_epochs in found.items():
        seeds = by_epochs[last]
        train = mean_std([seed["train"] for seed in seeds], 1, 100)
        cosine = mean_std([seed["cosine"] for seed in seeds])
        rows.append([name, chosen[name], *(percent(seeds, key) for key in FIRST), train, cosine])
        more.append([name, *(percent(seeds, key) for key in SECOND)])
    print(f"\nTest accuracy after {last} epochs, in brackets the three rarest classes of ten (%):")
    print(table(["trained with", "weight decay", *FIRST.values(), "train", "rare cos"], rows))
    print("\nOther heads on the same features (%):")
    print(table(["trained with", *SECOND.values()], more))
    lengths = sorted({epochs for by_epochs in found.values() for epochs in by_epochs})
    if len(lengths) > 1:
        rows = [
            [name, *(percent(by[n], "probe") if n in by else "-" for n in lengths)]
            for name, by in found.items()
        ]
        print("\nProbe by epochs of training (%):")
        print(table(["trained with", *map(str, lengths)], rows))


def draw(path: Path, found: dict[str, dict[int, list[dict]]], last: int) -> None:
    """Several lengths: probe accuracy against epochs. One: own head, cRT and probe side by side."""
    style = {name: common.styles([METHODS[name].name])[METHODS[name].name] for name in found}
    if any(len(by_epochs) > 1 for by_epochs in found.values()):
        lines = {}
        for name, by in found.items():
            lines[name] = sorted(by), [100 * np.mean([seed["probe"] for seed in by[n]]) for n in sorted(by)]
        axes = {"xlabel": "epochs of training", "ylabel": "test accuracy of a probe of the features, %"}
        common.curves(path, lines, style, title="How soon are the features learnt?", **axes)
        return
    bars = {}
    for name, by in found.items():
        bars[name] = {title: [100 * seed[key] for seed in by[last]] for key, title in FIRST.items()}
    axes = {"xlabel": "judge of the same features", "ylabel": "test accuracy, %"}
    common.bars(path, bars, style, title="Do remedies improve heads or features?", **axes)


# %% Command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    quoted = ", ".join(f'"{name}"' for name in METHODS)
    parser.add_argument(
        "--method", choices=METHODS, nargs="+", default=list(METHODS), metavar="NAME", help=quoted
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[60], help="the longest chooses")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="the first is trained on the grid")
    parser.add_argument("--weight-decay", nargs="+", default=DECAYS, help="the grid")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--no-training", action="store_true", help="the tables of what is finished")
    return parser.parse_args(argv)


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict[str, dict[int, list[dict]]]:
    """Train, print the tables, draw the figure. Raises UserError."""
    args = parse(argv)
    last = max(args.epochs)
    held_out = hold_out(args.dataset, args.data_dir, args.folder / "data")
    if not args.no_training:
        for decay in args.weight_decay:
            train(args, last, decay, args.method, args.seed[:1])
    chosen = choose(args, held_out)
    if not chosen:
        raise UserError(f"{args.folder}: no run of {last} epochs and seed {args.seed[0]} is finished")
    if not args.no_training:
        for epochs, decay in itertools.product(args.epochs, set(chosen.values())):
            train(args, epochs, decay, [name for name in chosen if chosen[name] == decay], args.seed)
    data = common.load_dataset(args.dataset, args.folder / "data")
    found = {name: {} for name in chosen}
    for name, epochs in itertools.product(chosen, args.epochs):
        runs = [read(args, epochs, chosen[name], name, seed) for seed in args.seed]
        for run in runs:
            if not run.finished:
                print(f"{run.folder}: not finished, left out", file=sys.stderr)
        seeds = [measure(run, METHODS[name], data, held_out) for run in runs if run.finished]
        if seeds:
            found[name][epochs] = seeds
    print_tables(found, chosen, last)
    if args.figure:
        draw(args.figure, found, last)
    return found


if __name__ == "__main__":
    common.command_line(main)
