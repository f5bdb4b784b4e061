"""The cache directory, and files in it that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from parts.ending import RefusedError
from parts.folders import folder_of

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_dir() -> Path:
    """``$MOEJAX_CACHE_DIR``, else ``$XDG_CACHE_HOME/moejax``, else ``~/.cache/moejax``.

    Raises:
        RefusedError: if a variable names no folder on this machine, or there is no home folder.
    """
    if own := folder_of("MOEJAX_CACHE_DIR"):
        return own
    return (folder_of("XDG_CACHE_HOME") or _home_cache()) / "moejax"


def _home_cache() -> Path:
    try:
        return Path("~/.cache").expanduser()
    except RuntimeError:  # a user without HOME and without an entry in the list of users
        raise RefusedError("there is no home folder: set MOEJAX_CACHE_DIR") from None


def store(path: Path, content: bytes) -> None:
    """Writes a file in one step: readers and other writers see the old file or the new one.

    A cache that cannot be written costs time later and nothing else, so it is only logged.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s could not be cached (%s); the next load takes longer.", path, error)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # it is gone where all went well
                os.unlink(temporary)


def store_checked(path: Path, content: bytes) -> None:
    """Stores the content behind its SHA-256."""
    store(path, hashlib.sha256(content).digest() + content)


def read_checked(path: Path) -> memoryview | None:
    """The content that ``store_checked`` wrote, or None if it is absent or damaged."""
    try:
        file = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, content = file[:_DIGEST_BYTES], file[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        logger.warning("%s is damaged and will be built again.", path)
        return None
    return content
