"""The images for the studies that learn from images."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from data import Dataset, load
from parts import ending
from parts.command_line import say
from parts.records import data_identity
from studies.command import identity_of


@cache
def loaded(data_dir: Path | None) -> Dataset:
    """The data, read once and announced."""
    with ending.refusals():
        data = load(data_dir)
    say(data.notice or f"Data: {data.source}")
    return data


def check_batch_size(batch_size: int, count: int) -> None:
    """Refuses a batch of more training images than there are.

    Raises:
        RefusedError: naming both.
    """
    if batch_size > count:
        raise ending.RefusedError(
            f"--batch-size must be at most the number of training images, {count}, got {batch_size}"
        )


def identity(args: argparse.Namespace) -> dict[str, str]:
    """The options that decide what is measured, and the data."""
    return identity_of(args) | data_identity(loaded(args.data_dir))
