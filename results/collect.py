"""Turn run folders into a table in Markdown.

    python results/collect.py runs/bmls_msclf/digitslt
    python results/collect.py runs/hug --columns accuracy train_accuracy lost_classes

A row is a script's method with one setting: every flag that decides what is computed, and the data. Flags in
which a script's rows differ are part of their names. Values are mean ± sample standard deviation over seeds.
A second run of one seed is named on stderr and left out, and so is a run that is not finished. --columns are
entries of result.json, a dot leads into one that holds several: `heads.nearest_mean`. Titles and units are
those of the script's COLUMNS, of which the first six are the default.

Below the table stand the flags that all of a script's rows share, hardware, commits, and the rows whose
training loss still falls: its mean over the last twentieth of the epochs is more than 5% below that over the
twentieth before.
"""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import HEADS, UNITS, Run, UserError, command_line, mean_std

Rows = dict[tuple[str, str, str], list[Run]]  # script, method and setting (as JSON) -> a run per seed


def read_runs(folders: list[Path]) -> Rows:
    """Every finished run below the folders by its row, in the order of its script's METHODS."""
    rows: Rows = {}
    for file in sorted(file for folder in folders for file in folder.rglob("config.json")):
        run = Run(file.parent)
        if run.finished is None:
            print(f"{run.folder}: not finished, left out", file=sys.stderr)
            continue
        config = run.config
        setting = config.get("setting") or {
            **config["flags"],
            "data": config["data"],
        }  # older runs have flags
        setting = {key: value for key, value in setting.items() if key not in ("method", "seed")}
        script = config.get("script") or run.folder.absolute().parents[2].name
        key = script, run.finished["method"], json.dumps(setting, sort_keys=True)
        seeds = {other.finished["seed"]: other.folder for other in rows.setdefault(key, [])}
        if run.finished["seed"] in seeds:
            print(f"{run.folder}: as {seeds[run.finished['seed']]}, the same seed, left out", file=sys.stderr)
        else:
            rows[key].append(run)
    if not rows:
        raise UserError(f"{' '.join(map(str, folders))}: no finished run below it")
    return dict(sorted(rows.items(), key=lambda row: (row[0][0], place(*row[0][:2]))))


def place(script: str, method: str) -> int:
    """Where a method's name comes in the METHODS of its script; -1: it is not there."""
    file = ROOT / f"{script}.py"
    return file.read_text().partition("\nMETHODS = ")[2].find(f'"{method}": ') if file.exists() else -1


def columns_of(rows: Rows) -> dict[str, tuple]:
    """{entry of result.json: (title, unit, meaning)} of the rows' scripts."""
    columns = {"accuracy": ("accuracy", "%")}
    for script in dict.fromkeys(key[0] for key in rows):
        if (ROOT / f"{script}.py").exists():
            columns = importlib.import_module(script).COLUMNS | columns
    return columns


def entry(run: Run, name: str) -> float:
    """A number of result.json; nan where it is not there."""
    value = run.finished
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else math.nan


def still_falls(runs: list[Run]) -> bool:
    """Does the training loss of a row's runs still fall at the end, so that they have not converged?"""
    before = after = 0.0
    for run in runs:  # a sum over seeds: Mixup's loss is noisy
        losses = [line["loss"] for line in run.history]
        n = max(1, len(losses) // 20)
        before += sum(losses[-2 * n : -n])
        after += sum(losses[-n:])
    return after < 0.95 * before


def in_words(flags: dict) -> str:
    """{"weight_decay": 0.01, "cut": True} -> "weight decay 0.01, cut"; what is off is not named."""
    words = {key.replace("_", " "): value for key, value in flags.items() if value not in (None, False)}
    return ", ".join(key if value is True else f"{key} {value}" for key, value in words.items())


def name_rows(rows: Rows) -> tuple[list[str], list[str]]:
    """A name for each row, `method`, what differs; and for each script a line with what its rows share."""
    names = []
    shared = {}
    for script, method, text in rows:
        setting = json.loads(text)
        others = [json.loads(key[2]) for key in rows if key[0] == script]
        same = {key for key in setting if all(other.get(key) == setting[key] for other in others)}
        own = in_words({key: value for key, value in setting.items() if key not in same})
        names.append(", ".join(filter(None, [f"`{method}`", script if len(others) < len(rows) else "", own])))
        shared[script] = f"{script}.py: {in_words({key: setting[key] for key in setting if key in same})}."
    return names, list(shared.values())


def markdown(rows: Rows, columns: dict[str, tuple]) -> str:
    """The table, and the lines below it."""
    names, shared = name_rows(rows)
    titles = [f"{title} {unit}".strip() for title, unit, *_ in columns.values()]
    table = [["method", "seeds", *titles], [":--", *["--:"] * (len(columns) + 1)]]
    for name, runs in zip(names, rows.values(), strict=True):
        cells = [name, str(len(runs))]
        for key, (_, unit, *_) in columns.items():
            cells.append(mean_std([entry(run, key) for run in runs], *UNITS.get(unit, (4, 1))))
        table.append(cells)
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", *shared]
    every = [run for runs in rows.values() for run in runs]
    lines.append(f"Hardware: {'; '.join(sorted({run.config['hardware'] for run in every}))}.")
    lines.append(f"Code: commit {', '.join(sorted({run.config['commit'][:10] for run in every}))}.")
    falling = [name for name, runs in zip(names, rows.values(), strict=True) if still_falls(runs)]
    if falling:
        lines.append(f"Training loss still falls: {'; '.join(falling)}.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--columns", nargs="+", metavar="ENTRY", help="entries of result.json")
    args = parser.parse_args(argv)
    rows = read_runs(args.folders)
    known = columns_of(rows)
    every = [run for runs in rows.values() for run in runs]
    there = [key for key in args.columns or known if any(entry(run, key) == entry(run, key) for run in every)]
    missing = [key for key in args.columns or [] if key not in there]
    if missing:
        raise UserError(f"--columns {' '.join(missing)}: in no result.json below these folders")
    known = {f"heads.{name}": (title, "%") for name, title in HEADS.items()} | known
    kept = there if args.columns else there[:6]
    text = markdown(rows, {key: known.get(key, (key, " ")) for key in kept})  # a unit of its own: four digits
    print(text)
    return {"table": text}


if __name__ == "__main__":
    command_line(main)
