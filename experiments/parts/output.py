"""The folder of a run: one run at a time writes there, and every file in it is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts.ending import RefusedError, whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def output_of_one_run(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; the system lets go of it if a run dies.

    Raises:
        RefusedError: if the folder cannot be made or written to, or another run writes there.
    """
    make_writable(folder)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(f"another run writes to --out {folder}: choose another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def make_writable(folder: Path) -> None:
    """Makes the folder, and finds out now, not after training, whether it can be written.

    Raises:
        RefusedError: if it cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"--out must be a folder, got the file {folder}; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 2**20)
    except OSError as error:
        raise RefusedError(
            f"cannot write to --out {folder}: {error.strerror}; choose another folder"
        ) from None


def save_text(text: str, path: Path) -> None:
    """Writes a text; what stood there before is replaced only once the new one is complete."""
    with whole_file(path) as other:
        other.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a picture; what stood there before is replaced only once the new one is complete."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path) as other:
        FigureCanvasAgg(figure).print_png(other)  # `savefig` would lay it out and draw it twice
