"""Turn run folders into a table, and put it into a page between two markers.

    python results/collect.py runs/bmls_msclf/cifar100lt
    python results/collect.py runs/bmls_msclf/cifar100lt --into results/bmls_msclf.md --name cifar100lt

A table has a row for each set of flags that was run, in the order of the script's METHODS, mean ± sample std
over seeds, and the flags that differ between its rows. Below it stand hardware, commit and the flags that all
rows share. Runs whose training loss still falls are named: its mean over the last twentieth of the epochs is
more than 5% below that over the twentieth before (both come after the learning rate's last step). The page
must have the lines `<!-- begin NAME -->` and `<!-- end NAME -->`; what stands between them is replaced. A
folder without result.json is an unfinished run and is named on stderr.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Run, UserError, mean_std, write_atomically

PERCENT = {  # shares; a table shows those that all its runs have
    "accuracy": "accuracy %",
    "train_accuracy": "train %",
    "best_accuracy": "best %",
    "many": "many %",
    "medium": "medium %",
    "few": "few %",
    "minus_log_n": "-log n %",  # heads: the same features, other heads
    "equal_length": "equal lengths %",
    "nearest_mean": "nearest mean %",
    "class_il": "class-IL %",  # fno_continual.py
    "task_il": "task-IL %",
    "forgetting": "forgetting %",
    "backward_transfer": "backward %",
    "own_energy": "own energy %",
    "fgsm": "FGSM %",  # hug.py
    "pgd": "PGD %",
    "angle_accuracy": "by angle %",  # spherization.py
    "near": "near %",
    "near_wrong": "near, wrong %",
    "hidden": "hidden %",
    "hidden_wrong": "hidden, wrong %",
    "accuracy_1shot": "1-shot %",
    "interval_1shot": "1-shot ± 95%",
    "accuracy_5shot": "5-shot %",
    "interval_5shot": "5-shot ± 95%",
    "offset": "3CosAdd %",
    "inputs": "input embeddings %",
    "choice": "four choices %",
    "purity": "purity %",  # nc_metrics.py: fine labels recovered from coarse training
    "probe": "probe %",
    "oracle_probe": "true labels %",
}
PLAIN = {
    "minority_cosine_W": "minority cos",
    "nc1": "NC1",
    "test_nc1": "test NC1",
    "cdnv": "CDNV",
    "sister_ratio": "sisters / within",
    "smallest_angle": "smallest angle",
    "energy": "energy",
    "within": "within",
    "norm_spread": "norm spread",
    "within_cosine": "within cosine",
}
# Where and how a run was written, not what it computed
LEFT_OUT = {"seed", "eval_every", "compile", "dry_run", "script", "test_share", "image_size"}


def read_runs(folders: list[Path]) -> list[Run]:
    """Every finished run below the folders, in the order of the script's METHODS. UserError if none."""
    runs = []
    for folder in folders:
        for path in sorted(folder.rglob("config.json")):
            run = Run(path.parent)
            if run.finished is None:
                print(f"{run.folder}: not finished, left out", file=sys.stderr)
                continue
            run.finished |= run.finished.get("heads", {})
            runs.append(run)
    if not runs:
        raise UserError(f"{' '.join(map(str, folders))}: no finished run below it")
    return sorted(runs, key=place)


def place(run: Run) -> int:
    """Where the run's method comes in its script: the position of `"name": Method` in source.py."""
    source = run.folder / "source.py"
    text = source.read_text() if source.exists() else ""
    found = re.search(rf'^    "{re.escape(run.name)}": Method', text, re.M)
    return found.end() if found else len(text)


def still_falls(runs: list[Run]) -> bool:
    """Does the training loss of a row's runs still fall at the end, so that they have not converged?"""
    before = after = 0.0
    for run in runs:  # a sum over seeds: Mixup's loss is noisy
        losses = [line["loss"] for line in run.history]
        n = max(1, len(losses) // 20)
        before += sum(losses[-2 * n : -n])
        after += sum(losses[-n:])
    return after < 0.95 * before


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def markdown(runs: list[Run]) -> str:
    """The table, and the lines below it."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        flags = {k: v for k, v in run.config["flags"].items() if k not in LEFT_OUT}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append(run)
    flags = [json.loads(key) for key in groups]
    names = [name for name in sorted(set().union(*flags)) if name != "method"]
    differing = [n for n in names if len({json.dumps(f.get(n)) for f in flags}) > 1]
    shared = [n for n in names if n not in differing and flags[0].get(n) not in (None, False)]
    measures = [key for key in (*PERCENT, "ece", *PLAIN) if all(key in run.finished for run in runs)]
    measures = [m for m in measures if any(run.finished[m] == run.finished[m] for run in runs)]  # not all nan
    titles = {**PERCENT, "ece": "ECE %", **PLAIN}
    header = ["method", *map(flag, differing), "seeds", *(titles[m] for m in measures)]
    rows = [header, [":--", *["--:"] * (len(header) - 1)]]
    for f, found in zip(flags, groups.values(), strict=True):
        values = [f.get(n) for n in differing]
        cells = [f"`{f['method']}`", *("" if v is None or v != v else v for v in values), len(found)]
        for m in measures:
            values = [run.finished[m] for run in found]
            cells.append(mean_std(values, 3 if m in PLAIN else 2, 1 if m in PLAIN else 100))
        rows.append(list(map(str, cells)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    minutes = [run.finished["seconds"] / 60 for run in runs if "seconds" in run.finished]
    hardware = "; ".join(sorted({run.config["hardware"] for run in runs}))
    lines += ["", f"All rows: {', '.join(f'{flag(n)} {flags[0][n]}' for n in shared)}."]
    if "rule" in runs[0].finished:
        lines.append(f"Groups: {runs[0].finished['rule']}.")
    lines.append(f"Hardware: {hardware}; {min(minutes):.1f} to {max(minutes):.1f} minutes per run.")
    alone = [found for found in groups.values() if "class_il" not in found[0].finished]  # no stream of tasks
    falling = [found[0].name for found in alone if still_falls(found)]
    if falling:
        lines.append(f"Not converged, training loss still falls: {', '.join(falling)}.")
    lines.append(f"Code: commit {', '.join(sorted({run.config['commit'][:10] for run in runs}))}.")
    return "\n".join(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's two markers. Raises UserError where they are missing."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    try:
        before, found, rest = page.read_text().partition(begin)
        _, closed, after = rest.partition(end)
    except OSError as error:
        raise UserError(f"--into {page}: not readable ({error.strerror})") from None
    if not (found and closed):
        raise UserError(f"--into {page}: expected the lines {begin} and {end} in it")
    write_atomically(page, lambda part: part.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}"))


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--into", type=Path, help="page to write the table into")
    parser.add_argument("--name", default="table", help="name of the two markers in that page")
    args = parser.parse_args(argv)
    try:
        text = markdown(read_runs(args.folders))
        if args.into:
            insert(args.into, args.name, text)
        else:
            print(text)
    except UserError as error:
        print(f"collect.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    return text


if __name__ == "__main__":
    main()
