"""The images of the studies that learn from some."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from data import Dataset, load
from parts import ending
from parts.command_line import say


@cache
def loaded(data_dir: Path | None) -> Dataset:
    """The data, read once and announced."""
    with ending.refusals():
        data = load(data_dir)
    say(data.notice or f"Data: {data.source}")
    return data
