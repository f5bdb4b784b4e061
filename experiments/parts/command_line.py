"""What the experiments' command lines share: options, what they refuse, and what they say."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from parts.ending import EndedError, RefusedError
from parts.folders import local_folder
from parts.progress import clear_bar

LARGEST_SEED = 2**32 - 1  # a larger one would be cut to the seed of another run
LARGEST_COUNT = 10**9  # of steps, examples and sizes: twice as many still fit in 32 bits


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that answers bad arguments with one line and exit code 2.

    An option cut short is a bad argument: ``--seed`` must not become ``--seeds``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(minimum: int, at_most: int = LARGEST_COUNT) -> Callable[[str], int]:
    """An argparse type: integers from ``minimum`` to ``at_most``."""

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"-?[0-9]{1,4000}", text) else None
        if number is None or not minimum <= number <= at_most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {minimum} to {at_most}, got {text[:80]}"
            )
        return number

    return parse


def folder_name(text: str) -> Path:
    """An argparse type: a folder on this machine, given with ``file:``, ``~`` or neither."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    try:
        return local_folder(text)
    except RefusedError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_float(text: str) -> float:
    """An argparse type: numbers above zero that float32 holds with all its digits."""
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"must be a number from {least:.3g} to {most:.3g}, got {text[:80]}"
        )
    return value


def add_out(parser: argparse.ArgumentParser, out: str) -> None:
    """The folder that a command writes to."""
    parser.add_argument(
        "--out",
        type=folder_name,
        default=Path(out),
        metavar="FOLDER",
        help="where pictures and numbers are written (default: %(default)s)",
    )


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Where the images are."""
    parser.add_argument(
        "--data-dir",
        type=folder_name,
        metavar="FOLDER",
        help="folder of IDX files, or of images by digit (default: $MOEJAX_DATA_DIR, else the "
        "cache, else a download)",
    )


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that every experiment has."""
    add_out(parser, out)
    parser.add_argument(
        "--seed",
        type=at_least(0, LARGEST_SEED),
        default=0,
        help="of all random numbers; the same seed repeats the run (default: %(default)s)",
    )
    add_no_cache(parser)


def add_no_cache(parser: argparse.ArgumentParser) -> None:
    """The option of a command that keeps what it compiles."""
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compile everything, instead of keeping compiled programs in the cache folder",
    )


def start_devices() -> None:
    """Finds the devices before anything else takes time.

    Raises:
        EndedError: if JAX has none of the kind that the environment asks for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where no platform is left
        first, *_ = *str(error).splitlines(), "JAX found no device"
        raise EndedError(f"{first} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')})") from None


def check_epochs(epochs: int, steps_per_epoch: int, options: str = "--epochs") -> None:
    """Refuses a run of more steps than can be counted.

    Args:
        epochs: how many are asked for.
        steps_per_epoch: which only the data tell.
        options: that ask for them.

    Raises:
        RefusedError: with the most epochs that there can be.
    """
    most = LARGEST_COUNT // steps_per_epoch
    if epochs > most:
        raise RefusedError(f"{options} must be at most {most:,} here, got {epochs}")


def check_memory(needed: int, options: str) -> None:
    """Refuses a run that the machine could not hold.

    Args:
        needed: the least bytes that the run takes.
        options: the options to choose smaller.

    Raises:
        RefusedError: with what it would take, and what there is.
    """
    there = machine_memory()
    if there is not None and needed > there:
        raise RefusedError(
            f"this run would take {in_words(needed)} of memory, and this machine has "
            f"{in_words(there)}: choose a smaller {options}"
        )


def machine_memory() -> int | None:
    """The bytes of memory that the machine has, as far as the system tells."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def in_words(size: int) -> str:
    """A number of bytes as a person writes it."""
    power = min(max(len(str(size)) - 1, 0) // 3, 5)
    return f"{size / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def say(text: str = "") -> None:
    """Prints at once, also into a pipe; a reader that has gone away does not stop training."""
    clear_bar()
    try:
        print(text, flush=True, file=sys.stdout)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open to the end
