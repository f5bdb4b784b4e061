"""The images for the studies that learn from images."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from data import Dataset, load
from parts import ending
from parts.command_line import say
from parts.records import data_identity
from studies.identity import identity_of


@cache
def loaded(data_dir: Path | None) -> Dataset:
    """The data, read once and announced."""
    with ending.refusals():
        data = load(data_dir)
    say(data.notice or f"Data: {data.source}")
    return data


def notice_of(args: argparse.Namespace) -> str:
    """What the reader of the results must know of the images; empty for a study without images."""
    return loaded(args.data_dir).notice if "data_dir" in args else ""


def check_published(notice: str) -> None:
    """Refuses to publish results beside which a notice has to stand.

    Raises:
        RefusedError: if there is one.
    """
    if notice:
        raise ending.RefusedError(
            "--docs needs all images of MNIST, got a sample: name their folder with --data-dir, or "
            "leave out --docs"
        )


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
