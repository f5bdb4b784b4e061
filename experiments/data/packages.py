"""Packages that only some sources of data need."""

from __future__ import annotations


def missing(package: str, reason: str) -> ImportError:
    """An error that names a package that is not installed, and the command that installs it.

    Example:
        >>> print(missing("pillow", "Images are decoded by it"))
        pillow is not installed. Images are decoded by it: pip install 'moejax[experiments]'
    """
    return ImportError(f"{package} is not installed. {reason}: pip install 'moejax[experiments]'")
