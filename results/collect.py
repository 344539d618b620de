"""Turn run folders into a table, and put it into a page between two markers.

    python results/collect.py runs/bmls_msclf/cifar100lt
    python results/collect.py runs/bmls_msclf/cifar100lt --into results/bmls_msclf.md --name cifar100lt

A table has a row for each set of flags that was run, mean ± sample std over seeds, and the flags that differ
between its rows. Below it stand hardware, commit and the flags that all rows share. The page must have the
lines `<!-- begin NAME -->` and `<!-- end NAME -->`; what stands between them is replaced. Reads result.json
and config.json only; a folder without result.json is an unfinished run and is named on stderr.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, mean_std, write_atomically

PERCENT = {
    "accuracy": "last %",
    "best_accuracy": "best %",
    "many": "many %",
    "medium": "medium %",
    "few": "few %",
    "angle_accuracy": "by angle %",
    "near": "near %",
    "near_wrong": "near, wrong %",
    "hidden": "hidden %",
    "hidden_wrong": "hidden, wrong %",
    "accuracy_1shot": "1-shot %",
    "interval_1shot": "1-shot ± 95%",
    "accuracy_5shot": "5-shot %",
    "interval_5shot": "5-shot ± 95%",
    "best_validation": "best val. %",
}
PLAIN = {
    "minority_cosine_W": "minority cos",
    "nc1": "NC1",
    "norm_spread": "norm spread",
    "within_cosine": "within cosine",
}
# Where and how a run was written, not what it computed
LEFT_OUT = {"seed", "eval_every", "compile", "dry_run"}


def read_runs(folders: list[Path]) -> list[tuple[dict, dict]]:
    """(config, result) of every finished run below the folders, sorted by path. UserError if none."""
    runs = []
    for folder in folders:
        for path in sorted(folder.rglob("config.json")):
            if not path.with_name("result.json").exists():
                print(f"{path.parent}: not finished, left out", file=sys.stderr)
                continue
            try:
                runs.append(
                    (json.loads(path.read_text()), json.loads(path.with_name("result.json").read_text()))
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{path.parent}: not readable ({error})") from None
    if not runs:
        raise UserError(f"{' '.join(map(str, folders))}: no finished run below it")
    return runs


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def markdown(runs: list[tuple[dict, dict]]) -> str:
    """The table, and the lines below it."""
    groups: dict[str, list] = {}
    for config, result in runs:
        flags = {k: v for k, v in config["flags"].items() if k not in LEFT_OUT}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append((config, result))
    flags = [json.loads(key) for key in groups]
    names = sorted(set().union(*flags))
    differing = [n for n in names if n != "method" and len({json.dumps(f.get(n)) for f in flags}) > 1]
    shared = [
        n for n in names if n != "method" and n not in differing and flags[0].get(n) not in (None, False)
    ]
    measures = [key for key in (*PERCENT, "ece", *PLAIN) if all(key in result for _, result in runs)]
    titles = {**PERCENT, "ece": "ECE %", **PLAIN}
    header = ["method", *(flag(n) for n in differing), "seeds", *(titles[m] for m in measures)]
    rows = [header, [":--", *["--:"] * (len(header) - 1)]]
    for f, found in zip(flags, groups.values(), strict=True):
        results = [result for _, result in found]
        cells = [
            mean_std([r[m] for r in results], 3 if m in PLAIN else 2, 1 if m in PLAIN else 100)
            for m in measures
        ]
        rows.append([f"`{f['method']}`", *(str(f.get(n)) for n in differing), str(len(results)), *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    same = ", ".join(f"{flag(n)} {flags[0][n]}" for n in shared)
    minutes = [result["seconds"] / 60 for _, result in runs if "seconds" in result]
    lines += [
        "",
        f"All rows: {same}.",
        *(f"Groups: {result['rule']}." for _, result in runs[:1] if "rule" in result),
        f"Hardware: {'; '.join(sorted({config['hardware'] for config, _ in runs}))}; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes of training a run.",
        f"Code: commit {', '.join(sorted({config['commit'][:10] for config, _ in runs}))}.",
    ]
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
