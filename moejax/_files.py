"""Files that are replaced once the new ones are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Other names to write files under; they get their own once all are complete.

    If one cannot be written, every file stays as it was, and nothing is left beside it.
    """
    partial = {path: path.with_name(path.name + ".partial") for path in paths}
    try:
        yield partial
        for path, complete in partial.items():
            os.replace(complete, path)
    finally:
        for other in partial.values():
            with contextlib.suppress(OSError):  # it is gone where all went well
                other.unlink()
