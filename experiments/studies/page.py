"""The page of docs that studies write: numbers come from stored summaries, never by hand.

Between two marks, ``<!-- NAME -->`` and ``<!-- /NAME -->``, stands what `render` makes of
``studies/NAME.json``. The prose around the marks is for people to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts.ending import RefusedError
from parts.output import save_figure, save_text
from parts.records import write_json

PAGE = "studies.md"
Summary = dict[str, Any]


def publish(
    docs: Path, name: str, summary: Summary, figure: Any, render: Callable[[Summary], str]
) -> None:
    """Stores a summary and its picture beside the page, and writes its section anew.

    Raises:
        RefusedError: if the page has no place for it.
    """
    page = docs / PAGE
    text = replaced(page.read_text(encoding="utf-8"), name, render(summary), page)
    (docs / "studies").mkdir(exist_ok=True)
    write_json(docs / "studies" / f"{name}.json", summary)
    save_figure(figure, docs / "studies" / f"{name}.png")
    save_text(text, page)


def check_page(docs: Path, name: str) -> None:
    """Checks that there is a place for a study, before it begins.

    Raises:
        RefusedError: if there is none.
    """
    page = docs / PAGE
    if not page.exists():
        raise RefusedError(f"--docs must be a folder that has {PAGE}, got {docs}")
    replaced(page.read_text(encoding="utf-8"), name, "", page)


def replaced(text: str, name: str, content: str, page: Path) -> str:
    """The page with another section."""
    if not pattern(name).search(text):
        raise RefusedError(f"{page} must have the lines <!-- {name} --> and <!-- /{name} -->")
    return pattern(name).sub(lambda _: f"<!-- {name} -->\n\n{content}\n<!-- /{name} -->", text)


def pattern(name: str) -> re.Pattern[str]:
    """The marks of a study, and what is between them."""
    return re.compile(rf"<!-- {name} -->\n\n?(.*?)\n?<!-- /{name} -->", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def duration(summary: Summary) -> str:
    """How long a study took, and on what."""
    seconds, machine = summary["seconds"], summary["versions"]
    time = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return (
        f"All this took {time}, compilation included, on {machine['cores']} cores "
        f"of {machine['processor']}.\n"
    )
