"""Features or heads: which of them does each remedy of a long tail improve? One table across the chapters.

    python results/remedies.py runs/remedies --figure results/remedies.png

Trains every method with every weight decay of the grid, all with the same network, images, schedule and
budget; the same command goes on where it stopped. A tenth of each class's training images is held out before
the long tail is cut. Per method, the weight decay that is right on most of them is the one whose test
accuracy is printed, so that nothing is chosen on the test images.

From trained features each head is made without training: the method's own, its class vectors at equal
lengths, log n_k taken off the logits, the nearest class mean (`heads` in common.py).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bmls_msclf
import etf_dr
import hug
from common import (
    HEADS,
    Run,
    UserError,
    bars,
    command_line,
    heads,
    load_dataset,
    mean_pairwise_cosine,
    mean_std,
    styles,
    table,
    write_atomically,
)

METHODS = {  # name in the table -> script, its method
    "cross-entropy": (bmls_msclf, "ce"),
    "Mixup": (bmls_msclf, "mixup"),
    "BMLS + MS-Clf": (bmls_msclf, "bmls+ms"),
    "ETF + DR": (etf_dr, "etf+dr"),
    "HUG": (hug, "hug-mhe"),
}
DECAYS = ("5e-5", "2e-4", "1e-3", "5e-3")


def hold_out(base: str, data_dir: Path, folder: Path) -> int:
    """Write FOLDER/BASE.npz with a tenth of each class's training images behind the test images.

    Returns how many those are. The scripts then train without them and keep the features of both.
    """
    data = load_dataset(base, data_dir)
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
    write_atomically(folder / f"{base}.npz", lambda part: np.savez(part, **arrays, classes=classes))
    return int(held_out.sum())


def train(args: argparse.Namespace) -> None:
    """Every method with every weight decay and seed, into FOLDER/wdDECAY; a finished run is left as it is."""
    hug.learning_rate = bmls_msclf.learning_rate  # one schedule for all: steps, not HUG's cosine
    for decay in args.weight_decay:
        for script, method in METHODS.values():
            flags = ["--dataset", f"{args.dataset}lt", "--net", "cnn", "--batch-size", "128", "--lr", "0.1"]
            flags += ["--epochs", str(args.epochs), "--eval-every", "20", "--precision", args.precision]
            flags += ["--weight-decay", decay, "--method", method, "--seed", *map(str, args.seed)]
            flags += ["--data-dir", str(args.folder / "data"), "--out", str(args.folder / f"wd{decay}")]
            script.main(flags)


def measure(run: Run, held_out: int) -> dict[str, float]:
    """Test accuracy under every head, of the three rarest classes also, and that on held-out images."""
    arrays = {key: torch.from_numpy(value) for key, value in run.load_features().items()}
    train = arrays["train_h"], arrays["train_y"]
    W = arrays["W"]
    n = torch.bincount(train[1], minlength=len(W))
    rare = n.argsort(stable=True)[: len(W) * 3 // 10]
    test_h = arrays["test_h"][:-held_out]
    test_y = arrays["test_y"][:-held_out]
    held_h = arrays["test_h"][-held_out:]
    held_y = arrays["test_y"][-held_out:]
    of_rare = torch.isin(test_y, rare)
    found = heads(*train, test_h, test_y, W)
    on_rare = heads(*train, test_h[of_rare], test_y[of_rare], W)
    return {
        **{name: found[name] for name in HEADS},
        **{f"{name}_rare": on_rare[name] for name in HEADS},
        "held_out": heads(*train, held_h, held_y, W)["own"],
        "train": run.finished["train_accuracy"],
        "cosine": mean_pairwise_cosine(W, rare),
    }


def choose(args: argparse.Namespace, held_out: int) -> dict[str, tuple[str, list[dict[str, float]]]]:
    """{method: (weight decay, measurements by seed)} of the weight decay that is best on held-out images."""
    chosen = {}
    for name, (script, method) in METHODS.items():
        found = {}
        for decay in args.weight_decay:
            place = args.folder / f"wd{decay}" / Path(script.__file__).stem / f"{args.dataset}lt" / method
            runs = [Run(place / f"seed{seed}") for seed in args.seed]
            if all(run.finished for run in runs):
                found[decay] = [measure(run, held_out) for run in runs]
        for decay, by_seed in found.items():
            on_held_out = mean_std([each["held_out"] for each in by_seed], 1, 100)
            on_test = mean_std([each["own"] for each in by_seed], 1, 100)
            print(f"{name}, weight decay {decay}: {on_held_out}% of held-out and {on_test}% of test images")
        if found:
            best = max(found, key=lambda decay: np.mean([each["held_out"] for each in found[decay]]))
            chosen[name] = best, found[best]
    return chosen


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--weight-decay", nargs="+", default=DECAYS, help="the grid")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--no-training", action="store_true", help="the table of what is finished")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train, print the table, draw the figure. Raises UserError."""
    args = parse(argv)
    held_out = hold_out(args.dataset, args.data_dir, args.folder / "data")
    if not args.no_training:
        train(args)
    chosen = choose(args, held_out)
    if not chosen:
        raise UserError(f"{args.folder}: no method is finished with every seed")
    rows = []
    found = {}
    for name, (decay, by_seed) in chosen.items():
        cells = []
        for head in HEADS:
            accuracy = mean_std([each[head] for each in by_seed], 1, 100)
            of_rare = mean_std([each[f"{head}_rare"] for each in by_seed], 1, 100)
            cells.append(f"{accuracy} ({of_rare})")
        train_accuracy = mean_std([each["train"] for each in by_seed], 1, 100)
        cosine = mean_std([each["cosine"] for each in by_seed])
        rows.append([name, decay, train_accuracy, *cells, cosine])
        found[name] = {HEADS[head]: [100 * each[head] for each in by_seed] for head in HEADS}
    print(table(["trained with", "weight decay", "train", *HEADS.values(), "rare cos"], rows))
    if args.figure:
        bars(args.figure, found, styles(found), xlabel="head on the same features", ylabel="test accuracy, %")
    return found


if __name__ == "__main__":
    command_line(main)
