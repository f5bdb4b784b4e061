"""MNIST from a folder, the cache or the network; and a stand-in that says what it is."""

from __future__ import annotations

import logging
import os
import tempfile
import textwrap
from pathlib import Path

from data.cache import cache_dir, store
from data.dataset import Dataset
from data.digits import digits
from data.download import download
from data.idx import NAMES, find, read_idx_folder
from data.tree import is_tree, read_tree

logger = logging.getLogger(__name__)

HOW_TO_GET_MNIST = (
    "put the four IDX files of MNIST into a folder and name it with `--data-dir` or the "
    "environment variable MOEJAX_DATA_DIR, or connect to the internet once"
)


def mnist(data_dir: str | Path | None = None) -> Dataset:
    """Loads MNIST: 60,000 training and 10,000 test images of handwritten digits.

    From ``data_dir`` if given, else the folder ``$MOEJAX_DATA_DIR`` if set, else the cache, else
    the network. A folder holds either the four IDX files, gzip or raw, which must be MNIST's by
    SHA-256, or images as PNG or JPEG, one folder per digit under ``train`` and ``test``. JPEG is
    lossy, so images are taken at their word; they are named "mnist" only where they are MNIST's
    pixel for pixel, and "custom" otherwise.

    Args:
        data_dir: the folder to read, and no other source if it is given.

    Returns:
        The dataset, images as uint8 [N, 28, 28] and labels as int32 [N].

    Raises:
        ValueError: naming the file or folder that is missing, damaged or not MNIST's.
        ConnectionError: if MNIST is neither on disk nor to be downloaded, with what to do.
    """
    folder = _given_folder(data_dir)
    if folder is None:
        try:
            return _cached_or_downloaded()
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {HOW_TO_GET_MNIST}.") from None
    return _read_mnist(folder)


def load(data_dir: str | Path | None = None) -> Dataset:
    """Loads what is to be had: a given folder, MNIST, or the digits of scikit-learn.

    A folder that is given, as ``data_dir`` or ``$MOEJAX_DATA_DIR``, must be valid; it may hold
    other data than MNIST in MNIST's format (Fashion-MNIST, a sample), then named "custom".
    Without a folder it is MNIST from the cache or the network, and where neither has it, the
    handwritten digits of scikit-learn: that is printed in a box, which the result carries as
    ``notice`` to be printed again beside whatever is measured.

    Args:
        data_dir: the folder to read, and no other source if it is given.

    Returns:
        The dataset, images as uint8 [N, 28, 28] and labels as int32 [N].

    Raises:
        ValueError: naming the file or folder that is missing, damaged or mixed up.
        ImportError: if a package is missing, with the command that installs it.
    """
    folder = _given_folder(data_dir)
    if folder is not None:
        return read_folder(folder)
    try:
        return _cached_or_downloaded()
    except ConnectionError as error:
        data = digits()
        data = data._replace(notice=_box(_stand_in_notice(data, error)))
        print(data.notice, flush=True)
        return data


def read_folder(folder: Path) -> Dataset:
    """Reads a folder of IDX files or of images, whichever it holds."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing of that name"
        raise ValueError(f"{folder} must be a folder, got {kind}; {HOW_TO_GET_MNIST}.")
    has_idx = any(find(folder, name) for name in NAMES)
    read, form = (
        (read_tree, "images") if is_tree(folder) and not has_idx else (read_idx_folder, "IDX files")
    )
    train, test, is_mnist = read(folder)
    return Dataset("mnist" if is_mnist else "custom", train, test, f"{form} in {folder}")


def _read_mnist(folder: Path) -> Dataset:
    data = read_folder(folder)
    first = find(folder, NAMES[0])
    if first is not None and data.name != "mnist":
        raise ValueError(
            f"{first} must be MNIST's file by SHA-256, got another data set of the same format; "
            "replace the four files, or load them as they are with `load` (`--dataset auto`)."
        )
    return data


def _given_folder(data_dir: str | Path | None) -> Path | None:
    folder = data_dir or os.environ.get("MOEJAX_DATA_DIR")
    return Path(folder).expanduser() if folder else None


def _cached_or_downloaded() -> Dataset:
    folder = cache_dir() / "mnist"
    if any(find(folder, name) for name in NAMES):
        try:
            return _read_mnist(folder)
        except ValueError as error:
            logger.warning("The cached MNIST is downloaded again: %s", error)
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary))
        try:
            data = _read_mnist(Path(temporary))
        except ValueError as error:
            raise ConnectionError(f"What was downloaded is not MNIST: {error}") from error
        for name in NAMES:
            store(folder / f"{name}.gz", Path(temporary, f"{name}.gz").read_bytes())
    return data._replace(source="the catalogue of tensorflow-datasets")


def _stand_in_notice(data: Dataset, error: ConnectionError) -> str:
    return (
        f"THIS IS NOT MNIST.\n{error}.\n"
        f"In its place: {data.source}, {len(data.train.labels):,} to train and "
        f"{len(data.test.labels):,} to test on. No result of this run is comparable with MNIST.\n"
        f"For MNIST, {HOW_TO_GET_MNIST}."
    )


def _box(text: str, width: int = 78) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    edge = "#" * (width + 6)
    return "\n".join([edge, *(f"## {line:<{width}} ##" for line in lines), edge])
