"""What holds for the repository as a whole: copies are equal, scripts stand alone, printed commands parse."""

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
METHODS = ("spherization", "fno_continual", "etf_dr", "bmls_msclf", "hug", "nc_metrics")
SCRIPTS = [ROOT / f"{name}.py" for name in METHODS if (ROOT / f"{name}.py").exists()]
FENCE = re.compile(r"^# \[copied: ([\w ]+)\]\n(.*?)^# \[end copied\]$", re.S | re.M)


def test_copied_blocks_are_equal_letter_for_letter():
    blocks = {}
    for script in SCRIPTS:
        text = script.read_text()
        found = FENCE.findall(text)
        assert len(found) == text.count("# [copied:") == text.count("# [end copied]"), script.name
        for name, block in found:
            blocks.setdefault(name, {})[script.name] = block
    assert "resnet32" in blocks
    for name, copies in blocks.items():
        assert len(set(copies.values())) == 1, f"{name} differs among {sorted(copies)}"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"], ids=lambda p: p.name)
def test_a_script_imports_no_other_script(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & set(METHODS)
    assert not imported & {"pickle", "marshal", "shelve"}


def printed_commands():
    """`python SCRIPT.py ...`, or torchrun, in README, in the results and in the scripts' docstrings."""
    sources = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md")), *SCRIPTS]
    for source in sources:
        text = (
            ast.get_docstring(ast.parse(source.read_text())) if source.suffix == ".py" else source.read_text()
        )
        text = text.replace("\\\n", " ")
        for script, words in re.findall(r"(?:python|torchrun [^\n`]*) (\w+)\.py([^\n`#&|;]*)", text):
            if script in METHODS:
                yield pytest.param(script, words, id=f"{source.name}: {script}{words}")


@pytest.mark.parametrize("script, words", list(printed_commands()))
def test_printed_commands_parse(script, words):
    words = re.sub(r"\s{2,}.*", "", words.rstrip())  # two spaces begin a remark
    if not {"...", "X"} & set(words.split()) and "$" not in words:  # $: a shell's loop
        importlib.import_module(script).parse(shlex.split(words))


def bmls_msclf(cell):
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    sampler = cell["BalancedMixedLabelSampler"](y, 3, torch.Generator().manual_seed(0))
    a, b = y[sampler.draw(6)].unbind(1)
    assert len({tuple(sorted(pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == 6
    assert cell["ms_raw"](torch.randn(6, 3), a, b, torch.rand(6)) > 0


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
    found = cell["neural_collapse"](F.one_hot(y, 6).double(), torch.eye(4, 6), y)
    assert found["nc1"] < 1e-20 and found["nc2_equiangular_M"] < 1e-12 and found["nc4"] == 0


def spherization(cell):
    x = cell["Spherization"](7)(torch.randn(5, 7))
    torch.testing.assert_close(x.norm(dim=1), torch.full((5,), 5.0))


@pytest.mark.parametrize("script", METHODS)
def test_the_method_cell_runs_when_pasted_alone(script):
    text = (ROOT / f"{script}.py").read_text()
    found = re.search(r"^# # 1\. The method.*?^# %%\n(.*?)^# %%", text, re.S | re.M)
    top = [node for node in ast.parse(found[1]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", "numpy", "math", "warnings"}
    cell = {"__name__": "pasted"}
    exec(compile(found[1], script, "exec"), cell)  # noqa: S102
    globals()[script](cell)


SECTIONS = ["1. The method", "2. Theory check", "3. Network", "4. Training", "5. Results", "6. Command line"]


def notebook_cells(script):
    return jupytext.reads((ROOT / f"{script}.py").read_text(), fmt="py:percent").cells


@pytest.mark.parametrize("script", METHODS)
def test_a_script_opens_as_a_notebook_with_text_and_code(script):
    """Its docstring and its sections are text, each section's code follows, and no banner is left in code."""
    cells = notebook_cells(script)
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert text[0].startswith(ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))[:60])
    assert len(text) == 1 + len(SECTIONS)
    for banner, section in zip(text[1:], SECTIONS, strict=True):
        assert banner.startswith(f"# {section}")
    for cell, following in itertools.pairwise(cells):
        if cell.source in text[1:]:
            assert following.cell_type == "code"
    for cell in cells:
        if cell.cell_type == "code":
            compile(cell.source, script, "exec")
            assert "# %%" not in cell.source


def test_the_cells_of_a_notebook_run_in_order(tmp_path, monkeypatch, capsys):
    """As Jupyter runs them: no __file__, the kernel's words in sys.argv, no exit at the end."""
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    doc = "Automatically created module for IPython interactive environment"
    notebook = types.ModuleType("__main__", doc)
    monkeypatch.setitem(sys.modules, "__main__", notebook)  # where the cells' classes are looked up
    for cell in notebook_cells("bmls_msclf"):
        if cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), vars(notebook))  # noqa: S102
    assert "in a notebook" in capsys.readouterr().out
    notebook.draw_figures = lambda *_: None  # which takes longer than all else here
    words = ["--dry-run", "--method", "ce", "--precision", "fp32", "--out", str(tmp_path)]
    found = notebook.main(words)
    assert [result["method"] for result in found["results"]] == ["ce"]
    assert (Path(found["folder"]) / "ce" / "seed0" / "result.json").exists()
