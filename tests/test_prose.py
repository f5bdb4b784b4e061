"""Prose of the pages is at most 100 characters wide."""

import re

import pytest

from pages import DOCS

WIDTH = 100
PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
NOT_PROSE = [
    r"^( *)```.*?^\1```",  # code
    r"^<!-- (\w+) -->.*?^<!-- /\1 -->",  # what an experiment writes
    r"^ *\|.*?$",  # a row of a table
    r"^    .*?$",  # a command
    r"^!\[.*?\)$",  # a picture
]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "lab_notes.md"], ids=lambda page: page.stem
)
def test_lines_are_short(page):
    prose = page.read_text()
    for pattern in NOT_PROSE:
        prose = re.sub(pattern, "", prose, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > WIDTH] == []
