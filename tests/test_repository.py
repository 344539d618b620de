"""What holds for the repository as a whole: lengths, copies, cells, printed commands, and plain pages."""

import ast
import importlib
import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import jupytext
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {  # lines of each file: design.md, section 3
    "nc_metrics": 700,
    "bmls_msclf": 660,
    "etf_dr": 620,
    "hug": 660,
    "fno_continual": 670,
    "spherization": 880,
    "common": 1250,
}
SCRIPTS = [name for name in LIMITS if name != "common"]
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in LIMITS}
FENCE = re.compile(r"^# \[copied: ([\w ]+)\]\n(.*?)^# \[end copied\]$", re.S | re.M)
every_script = pytest.mark.parametrize("name", SCRIPTS)


# %% Short enough to be read


@pytest.mark.parametrize("name", LIMITS)
def test_lengths_are_limits(name):
    lines = TEXT[name].splitlines()
    assert len(lines) <= LIMITS[name]
    tree = ast.parse(TEXT[name])
    text = set()  # lines of docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [line.strip() for number, line in enumerate(lines, 1) if number not in text]
    code = [line for line in code if line and not line.startswith("#")]
    assert sum(map(len, code)) / len(code) <= 51


def test_tests_are_no_longer_than_the_product():
    product = sum(len(text.splitlines()) for text in TEXT.values())
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")) <= product


@every_script
def test_the_docstring_fits_a_screen_and_its_equations_stand_apart(name):
    """45 lines with PEP 723; Markdown runs an indented line into the text right above it."""
    doc = ast.get_docstring(ast.parse(TEXT[name]), clean=False)
    assert TEXT[name][: TEXT[name].index(doc)].count("\n") + doc.count("\n") <= 45
    for above, line in itertools.pairwise(doc.splitlines()):
        if line.startswith("    ") and not above.startswith("    "):
            assert not above.strip(), line


# %% One thing, one place


def test_copied_blocks_are_equal_letter_for_letter():
    blocks = {}
    for name in SCRIPTS:
        fenced = FENCE.findall(TEXT[name])
        assert len(fenced) == TEXT[name].count("# [copied:") == TEXT[name].count("# [end copied]"), name
        for title, block in fenced:
            blocks.setdefault(title, {})[name] = block
    assert {"resnet32", "resnet18", "smallcnn", "learning_rate"} == set(blocks)
    for title, copies in blocks.items():
        assert len(copies) > 1 and len(set(copies.values())) == 1, f"{title} differs among {sorted(copies)}"


def test_eight_equal_lines_in_two_scripts_are_fenced_or_in_common():
    windows = {}
    for name in LIMITS:
        lines = [line.strip() for line in FENCE.sub("", TEXT[name]).splitlines() if line.strip()]
        for i in range(len(lines) - 7):
            windows.setdefault(tuple(lines[i : i + 8]), set()).add(name)
    assert {lines[0]: names for lines, names in windows.items() if len(names) > 1} == {}


@pytest.mark.parametrize("name", LIMITS)
def test_a_script_imports_no_other_script(name):
    imported = set()
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & set(SCRIPTS)
    assert not imported & {"pickle", "marshal", "shelve"}


# %% Cells


SECTIONS = ["1. The method", "2. Theory check", "3. Network", "4. Training", "5. Results", "6. Command line"]


def cells_of(name):
    return jupytext.reads(TEXT[name], fmt="py:percent").cells


def method_cells(name):
    """The code cells of section 1, each with the text above it."""
    section = ""
    for above, cell in itertools.pairwise(cells_of(name)):
        if above.cell_type == "markdown":
            section = (
                re.match(r"# (\d)\. ", above.source)[1] if re.match(r"# \d\. ", above.source) else section
            )
        if section == "1" and cell.cell_type == "code" and not cell.source.startswith("# Imports"):
            if not re.search(r"^import common$|^import argparse$", cell.source, re.M):
                yield above, cell


@every_script
def test_a_notebook_has_text_equation_and_code_by_turns(name):
    cells = cells_of(name)
    banners = [
        re.match(r"# (\d\. .*?)(:|$)", cell.source, re.M) for cell in cells if cell.cell_type == "markdown"
    ]
    assert [banner[1] for banner in banners if banner] == SECTIONS
    last = [cell.source for cell in cells].index(next(c.source for c in cells if c.source.startswith("# 5.")))
    for cell in cells[:last]:
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 60, cell.source[:80]
    functions = 0
    for above, cell in method_cells(name):
        defined = [n for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        if defined:
            functions += 1
            assert len(defined) <= 2 and above.cell_type == "markdown", defined[0].name
            assert all(ast.get_docstring(node) for node in defined)
    assert functions >= 3


def bmls_msclf(cell):
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    sampler = cell["BalancedMixedLabelSampler"](y, 3, torch.Generator().manual_seed(0))
    a, b = y[sampler.draw(6)].unbind(1)
    assert len({tuple(sorted(pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == 6
    assert cell["ms_raw"](torch.randn(6, 3), a, b, torch.rand(())) > 0


def etf_dr(cell):
    W = cell["simplex_etf"](4, 8)
    y = torch.arange(4)
    assert cell["dot_regression_loss"](W[y], W, y) < 1e-20 < cell["cross_entropy_loss"](W[y], W, y)


def fno_continual(cell):
    Q = cell["fno_classifier"](4, 10)
    torch.testing.assert_close(Q @ Q.T, torch.eye(4).double())


def hug(cell):
    W = torch.randn(4, 8, requires_grad=True)
    cell["hug_loss"](torch.randn(6, 8), W, torch.tensor([0, 0, 1, 1, 3, 3])).backward()
    assert W.grad.isfinite().all()


def nc_metrics(cell):
    y = torch.arange(4).repeat(50)
    measured = cell["neural_collapse"](F.one_hot(y, 6).double(), torch.eye(4, 6), y)
    assert measured["nc1"] < 1e-20 and measured["nc2_equiangular_M"] < 1e-12 and measured["nc4"] == 0


def spherization(cell):
    x = cell["Spherization"](7)(torch.randn(5, 7))
    torch.testing.assert_close(x.norm(dim=1), torch.full((5,), 5.0))


def test_method_sections_run_when_pasted_into_one_notebook(monkeypatch, tmp_path):
    """With torch, numpy and math alone (nc_metrics.py: scikit-learn too), and no name means two things."""
    monkeypatch.chdir(tmp_path)
    notebook = {"__name__": "pasted"}
    owner = {}
    for name in SCRIPTS:
        libraries = {"torch", "numpy", "math", "warnings", *(("scipy", "sklearn") * (name == "nc_metrics"))}
        for _, cell in method_cells(name):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = (
                        [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    )
                    assert {module.split(".")[0] for module in modules} <= libraries, name
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    assert owner.setdefault(node.name, name) == name, node.name
            exec(compile(cell.source, name, "exec"), notebook)  # noqa: S102
    for name in SCRIPTS:
        globals()[name](notebook)


@pytest.mark.parametrize("name", ["bmls_msclf", "fno_continual"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch, capsys):
    """As Jupyter runs it: no __file__, the kernel's words in sys.argv, no exit at the end."""
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    notebook = types.ModuleType("__main__", "Automatically created module")
    monkeypatch.setitem(sys.modules, "__main__", notebook)  # where the cells' classes are looked up
    for cell in cells_of(name):
        if cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), vars(notebook))  # noqa: S102
    assert "in a notebook" in capsys.readouterr().out
    words = ["--dry-run", "--precision", "fp32", "--out", str(tmp_path)]
    results = notebook.main([*words, "--method", "ce" if name == "bmls_msclf" else "er"])["results"]
    assert results and all(0 <= result["accuracy"] <= 1 for result in results)


# %% Printed commands and pages


def printed_commands():
    """`python SCRIPT.py ...`, or torchrun, in README, in the results and in the scripts' docstrings."""
    texts = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "results").glob("*.md")]}
    texts |= {f"{name}.py": ast.get_docstring(ast.parse(TEXT[name])) for name in SCRIPTS}
    for source, text in texts.items():
        text = text.replace("\\\n", " ")
        for script, words in re.findall(r"(?:python|torchrun [^\n`]*) (\w+)\.py([^\n`#&|;]*)", text):
            if script in SCRIPTS:
                yield pytest.param(script, words, id=f"{source}: {script}{words}")


@pytest.mark.parametrize("script, words", list(printed_commands()))
def test_printed_commands_parse(script, words):
    words = re.sub(r"\s{2,}.*", "", words.rstrip())  # two spaces begin a remark
    if not {"...", "X"} & set(words.split()) and "$" not in words:  # $: a shell's loop
        importlib.import_module(script).parse(shlex.split(words))
