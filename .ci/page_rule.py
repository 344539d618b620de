"""The page rule: every function of a script is entered by a command that README, docstrings or pages print.

    python .ci/page_rule.py [SCRIPT ...]

Runs the printed commands on small made-up data, with --dry-run, until all are entered; names what never is. A
line that no run needs is a line that every reader has to read.
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

SCRIPTS = ["nc_metrics", "bmls_msclf", "etf_dr", "hug", "fno_continual", "spherization"]
EXCEPTIONS = {  # at most five, each with its reason
    "spherization.pretrained_language": "needs an encoder's files, which are no part of the repository",
    "spherization.pretrained_language.split": "the same",
    "spherization.pretrained": "the same",
    "spherization.read_lines": "the same, and its text",
}


def write_data(folder: Path) -> None:
    """NAME.npz of random images: two or more of each class, as few as the scripts take."""
    rng = np.random.default_rng(0)
    for name, K, shape in (
        ("mnist", 10, (28, 28, 1)),
        ("cifar10", 10, (32, 32, 3)),
        ("cifar100", 100, (32, 32, 3)),
    ):
        arrays = {}
        for split, n in (("train", 25), ("test", 5)):
            arrays[f"{split}_y"] = np.arange(K).repeat(n)
            arrays[f"{split}_x"] = rng.integers(0, 256, (K * n, *shape), dtype=np.uint8)
        names = ["apple", *(f"class {k}" for k in range(1, K - 1)), "worm"]
        np.savez(folder / f"{name}.npz", **arrays, classes=np.array(names))


class Tiny(torch.nn.Module):
    """Stands for torchvision's ResNet-18, whose steps take seconds: (B, C, H, W) -> (B, 512)."""

    def forward(self, x):
        return self.conv1(x).mean((2, 3)).repeat(1, 8)


def printed_commands() -> dict[str, list[list[str]]]:
    """The words of every printed command, by script, each once; a loop's variable is its first value."""
    texts = [
        (ROOT / "README.md").read_text(),
        *(path.read_text() for path in (ROOT / "results").glob("*.md")),
    ]
    texts += [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) for name in SCRIPTS]
    commands = {name: [[]] for name in SCRIPTS}
    for text in texts:
        text = text.replace("\\\n", " ")
        for variable, value in re.findall(r"for (\w+) in (\S+)", text):
            text = re.sub(rf"\${{?{variable}\b}}?", value, text)
        for script, words in re.findall(r"(?:python|torchrun [^\n`]*?) (\w+)\.py([^\n`#&|;]*)", text):
            words = shlex.split(re.sub(r"\s{2,}\S.*", "", words.rstrip()))
            if script in SCRIPTS and "..." not in words and not any("PATH" in word for word in words):
                commands[script].append(words)
    return commands


def shorten(words: list[str], out: Path) -> list[str]:
    """A dry run of the command, its own folder and few seeds; what only repeats is left out."""
    kept = []
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word in (
                "--seed",
                "--out",
                "--epochs",
                "--precision",
                "--eval-every",
                "--data-dir",
                "--episodes",
            )
        if not skip:
            kept.append(word)
    kept += [] if "fewshot" in kept else ["--batch-size", "16"]
    return [*kept, "--dry-run", "--precision", "fp32", "--device", "cpu", "--data-dir", str(out / "data")]


def functions(path: Path) -> dict[str, int]:
    """{qualified name: first line} of every function and method of a script, decorators included."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    found[name] = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(path.read_text()), "")
    return found


def never_entered(name: str, commands: list[list[str]], folder: Path) -> set[str]:
    """The functions of a script that none of its commands enters; no more commands run than it takes."""
    script = importlib.import_module(name)
    missing = {line: f"{name}.{function}" for function, line in functions(ROOT / f"{name}.py").items()}
    missing = {line: function for line, function in missing.items() if function not in EXCEPTIONS}

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename == script.__file__:
            missing.pop(frame.f_code.co_firstlineno, None)

    def run(words):
        sys.setprofile(profile)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                script.main(words)
        finally:
            sys.setprofile(None)

    for number, words in enumerate(sorted(commands, key=lambda words: ("cifar" in str(words), len(words)))):
        words = words if "--synthetic" in words else shorten(words, folder)
        if "--features" in words or "--run" in words:
            features = next(folder.rglob("features.npz")).parent
            words = ["--run", str(features), *(["--json"] if "--json" in words else [])]
        if "--model" not in words and any("load_state" not in name for name in missing.values()):
            run([*words, "--out", str(folder / str(number))])
    save = common.Run._save

    def save_and_stop(*parts):
        save(*parts)
        raise KeyboardInterrupt

    for method in script.METHODS:
        if not any("load_state" in name for name in missing.values()):
            break
        words = ["--epochs", "2", "--method", method, "--out", str(folder / "again")]
        for common.Run._save in (save_and_stop, save):  # "the same command again goes on", README says
            with contextlib.suppress(KeyboardInterrupt):
                run(words)
    return set(missing.values())


def main() -> int:
    torch.set_num_threads(1)
    torchvision.models.resnet18 = lambda weights: Tiny()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        write_data(Path(folder) / "data")
        commands = printed_commands()
        for name in sys.argv[1:] or SCRIPTS:
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "data").symlink_to(Path(folder) / "data")
            missed += sorted(never_entered(name, commands[name], Path(folder) / name))
            print(f"{name}: {len(commands[name])} printed commands", flush=True)
    for function in missed:
        print(f"{function}: no printed command enters it; give it one, or leave it out")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
