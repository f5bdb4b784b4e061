"""Folders as people write them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from parts.ending import RefusedError, before_the_end


def local_folder(text: str | os.PathLike[str]) -> Path:
    """A folder on this machine, given with ``file:``, ``~`` or neither.

    Raises:
        RefusedError: if it is the address of something else, which as a path would make a folder
            called ``s3:`` here, or the home of a user that is not there.
    """
    text = os.fspath(text)
    if here := re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", text, re.DOTALL):
        return Path(unquote(here[1]))
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", text):  # a single slash in a Path of s3://bucket
        raise RefusedError(f"must be a folder on this machine, got {text}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise RefusedError(f"must be a folder on this machine, got {text}: no such user") from None


def check_named_in_utf8(folder: Path) -> None:
    """Refuses a folder for checkpoints whose name what writes them cannot take.

    Raises:
        RefusedError: if its path is not UTF-8, as with other letters in an ASCII locale.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise RefusedError(
            f"the path of checkpoints must be UTF-8, got {str(folder.absolute())!a}: set "
            "PYTHONUTF8=1, or choose another --out"
        ) from None


def folder_of(variable: str) -> Path | None:
    """The folder that an environment variable names, or None where it is not set or empty."""
    value = os.environ.get(variable)
    try:
        return local_folder(value) if value else None
    except RefusedError as error:
        raise RefusedError(f"{variable} {error}") from None


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is deleted at the end, and before a signal ends the process."""
    folder = tempfile.TemporaryDirectory()
    with folder as name, before_the_end(folder.cleanup):
        yield name
