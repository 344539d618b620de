"""What holds for the repository as a whole: copies are equal, scripts stand alone, printed commands parse."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

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
    if "..." not in words and "X" not in words.split():
        importlib.import_module(script).parse(shlex.split(words))
