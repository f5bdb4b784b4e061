"""Paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote


def local(path: str | os.PathLike[str]) -> Path:
    """The absolute path of something on this machine, given with ``file:``, ``~`` or neither.

    Raises:
        ValueError: if it is an address elsewhere, such as ``s3://bucket``; taken as a path, it
            would make a folder called ``s3:`` here, or in the home of a user that is not there.
    """
    text = os.fspath(path)
    if here := re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", text, re.DOTALL):
        return Path(unquote(here[1])).absolute()
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", text):  # a single slash in a Path of s3://bucket
        raise ValueError(
            f"The path must be one on this machine, or of what is mounted here, got {path}."
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(
            f"The path must be one on this machine, got {path}: no such user."
        ) from None
