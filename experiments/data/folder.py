"""A folder of MNIST in any of its layouts, or one line that says what was found instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.dataset import Dataset
from data.idx import NAMES, holds_idx, read_idx_folder
from data.tree import DIGITS, is_stray, is_tree, read_tree

HOW_TO_GET_MNIST = (
    "put the four IDX files of MNIST into a folder and name it with `--data-dir` or the "
    "environment variable MOEJAX_DATA_DIR, or connect to the internet once"
)
SHOWN = 5  # entries of a folder that an error lists


def read_folder(folder: Path) -> Dataset:
    """Reads a folder of IDX files or of images, or the one folder in it that holds them.

    Raises:
        ValueError: naming the file or folder that is missing, damaged, unreadable or mixed up.
        ImportError: if the images need a package that is not installed.
    """
    with one_line(folder):
        folder = located(folder)
        if holds_idx(folder):
            train, test, is_mnist = read_idx_folder(folder)
            form = "IDX files"
        else:
            train, test, is_mnist = read_tree(folder)
            form = "images"
    return Dataset("mnist" if is_mnist else "custom", train, test, f"{form} in {folder}")


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Names the file that the system refuses to read: unreadable, vanished, a broken link."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder} must be readable, got: {error.strerror or error}; "
            "mend or remove it."
        ) from error


def located(folder: Path) -> Path:
    """The folder that holds the data: the one that is named, or the only one inside it."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing of that name"
        raise ValueError(f"{folder} must be a folder, got {kind}; {HOW_TO_GET_MNIST}.")
    if holds_data(folder):
        return folder
    entries = sorted(path for path in folder.iterdir() if not is_stray(path.name))
    inside = [path for path in entries if path.is_dir() and holds_data(path)]
    if len(inside) == 1:
        return inside[0]
    names = {path.name for path in entries}
    if names & DIGITS:
        raise ValueError(
            f"{folder} must hold the folders train and test, got the digits {_shown(names)}: "
            f"name the folder above it, {folder.parent}."
        )
    raise ValueError(
        f"{folder} must hold the four IDX files, such as {NAMES[0]}.gz, or the folders train and "
        f"test with a folder of PNG or JPEG images per digit, got {_shown(names)}; "
        f"{HOW_TO_GET_MNIST}."
    )


def holds_data(folder: Path) -> bool:
    """Whether the folder has an IDX file or a training set of images in it."""
    return holds_idx(folder) or is_tree(folder)


def _shown(names: set[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "nothing") + more
