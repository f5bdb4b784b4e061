"""The code of a page of docs, to be run as it stands, and what the page says that it prints."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def blocks_of(page, language):
    """The fenced blocks of a page that are written in a language."""
    text = (DOCS / page).read_text()
    pattern = rf"^```{re.escape(language)}\n(.*?)^```"
    return re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)


def code_of(page, mark=""):
    """The blocks of Python on a page; those that need more than Flax bear a mark."""
    return "\n".join(blocks_of(page, f"python {mark}".strip()))


def words_and_numbers(text):
    """A text without its numbers, and the numbers."""
    number = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.sub(number, "#", text), [float(one) for one in re.findall(number, text)]
