"""README and the pages of results/ stay short enough to be read. Renders nothing, counts."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "results").glob("*.md"))}
every_page = pytest.mark.parametrize("name", ["README.md", *PAGES])


def text_of(name):
    return README if name == "README.md" else PAGES[name]


def prose(text):
    """Without code, addresses of links, and comments."""
    text = re.sub(r"```.*?```|^(    [^\n]*\n)+|`[^`\n]*`|<!--.*?-->", "", text, flags=re.S | re.M)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_readme_has_at_most_900_words_and_60_numbers():
    assert len(README.split()) <= 900  # as wc -w, tables included
    numbers = re.findall(r"(?<![\w.])-?\d[\d.,/]*", prose(README))
    assert len(numbers) <= 60


def test_pages_together_have_at_most_9000_words():
    assert sum(len(text.split()) for name, text in PAGES.items() if name != "exercises.md") <= 9000


@every_page
def test_the_first_table_has_at_most_seven_columns(name):
    """More are cut off at 1,200 pixels."""
    ruler = re.search(r"^\|[-:| ]+\|$", text_of(name), re.M)
    assert not ruler or ruler[0].count("|") <= 8


@every_page
def test_lines_end_at_110_characters(name):
    """Outside tables, addresses and code."""
    text = re.sub(r"```.*?```", "", text_of(name), flags=re.S)
    for line in re.sub(r"\]\([^)]*\)", "]", text).splitlines():
        assert len(line) <= 110 or line.startswith("|"), line


@every_page
def test_figures_and_links_exist(name):
    folder = ROOT if name == "README.md" else ROOT / "results"
    for address in re.findall(r"\]\(([^)#]+)", text_of(name)):
        assert address.startswith("https://") or (folder / address).exists(), address
