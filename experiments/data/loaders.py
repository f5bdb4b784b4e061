"""MNIST from a folder, the cache or the network; and a sample that says what it is."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path

from data.cache import cache_dir, store
from data.dataset import Dataset
from data.download import download
from data.folder import HOW_TO_GET_MNIST, located, read_folder
from data.idx import NAMES, find, holds_idx
from data.sample import mnist_sample
from parts.folders import folder_of, local_folder, temporary_folder

logger = logging.getLogger(__name__)


def mnist(data_dir: str | Path | None = None) -> Dataset:
    """Loads MNIST: 60,000 training and 10,000 test images of handwritten digits.

    From ``data_dir`` if given, else the folder ``$MOEJAX_DATA_DIR`` if set, else the cache, else
    the network. A folder holds either the four IDX files, gzip or raw, which must be MNIST's by
    SHA-256, or images as PNG or JPEG, one folder per digit under ``train`` and ``test``. JPEG is
    lossy, so images are taken at their word; they are named "mnist" only where they are MNIST's
    pixel for pixel, and "custom" otherwise.

    Args:
        data_dir: the folder to read; if it is given, no other source is tried.

    Returns:
        The dataset, images as uint8 [N, 28, 28] and labels as int32 [N].

    Raises:
        ValueError: naming the file or folder that is missing, damaged or not MNIST's.
        ConnectionError: if MNIST is not on disk and cannot be downloaded, with what to do.
    """
    folder = _given_folder(data_dir)
    if folder is None:
        try:
            return _cached_or_downloaded()
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {HOW_TO_GET_MNIST}.") from None
    return _read_mnist(folder)


def load(data_dir: str | Path | None = None) -> Dataset:
    """Loads a given folder, else MNIST, or a sample of MNIST where there is no network.

    A folder that is given, as ``data_dir`` or ``$MOEJAX_DATA_DIR``, must be valid; it may hold
    other data than MNIST in MNIST's format (Fashion-MNIST, a sample), which is named "custom".
    Without a folder, MNIST comes from the cache or the network. Where neither has it, the 5,000
    images that `mnist_sample` loads take its place, with a ``notice`` to print beside the figures:
    a box that says what they can be compared with.

    Args:
        data_dir: the folder to read; if it is given, no other source is tried.

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
        data = mnist_sample()
        return data._replace(notice=_box(_notice(data, error)))


def _read_mnist(folder: Path) -> Dataset:
    data = read_folder(folder)
    first = find(located(folder), NAMES[0])
    if first is not None and data.name != "mnist":
        raise ValueError(
            f"{first} must be MNIST's file by SHA-256, got another data set of the same format; "
            "replace the four files, or load them as they are with `load` (`--dataset auto`)."
        )
    return data


def _given_folder(data_dir: str | Path | None) -> Path | None:
    return local_folder(data_dir) if data_dir else folder_of("MOEJAX_DATA_DIR")


def _cached_or_downloaded() -> Dataset:
    folder = cache_dir() / "mnist"
    try:
        if holds_idx(folder):
            return _read_mnist(folder)
    except (OSError, ValueError) as error:  # a folder that cannot be entered, or damaged files
        logger.warning("The cached MNIST is downloaded again: %s", error)
    with temporary_folder() as temporary:
        download(Path(temporary))
        try:
            data = _read_mnist(Path(temporary))
        except ValueError as error:
            raise ConnectionError(f"What was downloaded is not MNIST: {error}") from error
        for name in NAMES:
            store(folder / f"{name}.gz", Path(temporary, f"{name}.gz").read_bytes())
    return data._replace(source="the catalogue of tensorflow-datasets")


def _notice(data: Dataset, error: ConnectionError) -> str:
    return (
        f"A SAMPLE OF MNIST, NOT ALL OF IT.\n{error}.\n"
        f"In its place: {data.source}, {len(data.train.labels):,} to train and "
        f"{len(data.test.labels):,} to test on. Compare these figures with others of the same "
        "sample, not with published ones: those are of 60,000 and 10,000 images.\n"
        f"For all 70,000, {HOW_TO_GET_MNIST}."
    )


def _box(text: str, width: int = 78) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    edge = "#" * (width + 6)
    return "\n".join([edge, *(f"## {line:<{width}} ##" for line in lines), edge])
