"""Image folders: one folder per digit under ``train`` and ``test``, PNG or JPEG."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.datasets.cache import cache_dir, read_checked, store_checked
from moejax.datasets.types import Split
from moejax.progress import progress

SPLITS = (("train", "training"), ("test", "testing"))
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
EXACT_MODES = ("L", "1", "P", "RGB")  # those that Pillow turns into 8-bit grey without loss

# SHA-256 of MNIST's (label, pixels) records in sorted order, so that file names do not matter.
MNIST_SHA256 = (
    "da6370735bf1d490f086dde49c15f2ed0480ad05dc7c70abf5d36bf471d5e312",
    "0c7bc63f656fb2440dc2b5bea4ff3ac8632e305b73ec1dc88141a32d36204fac",
)


class Entry(NamedTuple):
    """One image file, and what changes whenever it is written."""

    path: str
    split: int  # 0 train, 1 test
    digit: int
    size: int
    modified: int  # ns
    changed: int  # ns; unlike `modified`, no program can set it back


def is_tree(folder: Path) -> bool:
    """Whether the folder has a training folder in it."""
    return any((folder / name).is_dir() for name in SPLITS[0])


def read_tree(folder: Path) -> tuple[Split, Split, bool]:
    """Decodes every image of the folder, or reads what was decoded of the very same files before.

    The decoded arrays are cached, one file per folder, and belong to the path, size, modification
    and change time of every image. Examples are ordered by digit, then by file name.

    Returns:
        The training set, the test set, and whether they are MNIST (by SHA-256, in any order).

    Raises:
        ValueError: naming the folder or image that is missing, damaged or of the wrong shape.
        ImportError: if Pillow is not installed.
    """
    folder = folder.resolve()
    entries = scan(folder)
    key = hashlib.sha256(repr(entries).encode()).hexdigest()
    file = cache_dir() / "images" / hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    if (content := read_checked(file)) is not None:
        with np.load(io.BytesIO(content)) as arrays:
            if arrays["key"] == key:
                return *_unpack(arrays), bool(arrays["is_mnist"])
    arrays = _decode_all(entries)
    if scan(folder) != entries:
        raise ValueError(f"{folder} must not change while it is read, but did; load it again.")
    train, test = _unpack(arrays)
    is_mnist = (fingerprint(train), fingerprint(test)) == MNIST_SHA256
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), is_mnist=np.array(is_mnist), **arrays)
    store_checked(file, buffer.getvalue())
    return train, test, is_mnist


def scan(folder: Path) -> list[Entry]:
    """Lists the image files of both splits, ordered by split, digit and name."""
    return [
        entry
        for split, names in enumerate(SPLITS)
        for digit, directory in enumerate(_digit_folders(_split_folder(folder, names)))
        for entry in _scan_digit(directory, split, digit)
    ]


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold exactly one folder named {' or '.join(names)}, got {len(found)}; "
            "keep one folder of images per split."
        )
    return found[0]


def _digit_folders(folder: Path) -> list[Path]:
    found = {e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")}
    expected = {str(digit) for digit in range(10)}
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise ValueError(
            f"{folder} must hold one folder per digit, 0 to 9, got {missing} missing and "
            f"{extra} besides; put each image under its digit."
        )
    return [folder / str(digit) for digit in range(10)]


def _scan_digit(folder: Path, split: int, digit: int) -> list[Entry]:
    entries = []
    for file in os.scandir(folder):
        if file.name.lower().endswith(IMAGE_ENDINGS) and not file.name.startswith("."):
            s = file.stat()
            entries.append(Entry(file.path, split, digit, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    if not entries:
        raise ValueError(
            f"{folder} must hold PNG or JPEG images, got none; add the images of {digit}."
        )
    return sorted(entries)


def _decode_all(entries: list[Entry]) -> dict[str, np.ndarray]:
    images = np.empty((len(entries), 28, 28), np.uint8)
    start = 0
    for split, (split_name, _) in enumerate(SPLITS):
        for digit in range(10):
            paths = [e.path for e in entries if (e.split, e.digit) == (split, digit)]
            for i, path in enumerate(progress(paths, f"decoding {split_name}/{digit}"), start):
                images[i] = decode(path)
            start += len(paths)
    labels = np.array([e.digit for e in entries], np.int32)
    num_train = sum(e.split == 0 for e in entries)
    return {"images": images, "labels": labels, "num_train": np.array(num_train)}


def _unpack(arrays: Mapping[str, np.ndarray]) -> tuple[Split, Split]:
    images, labels, n = arrays["images"], arrays["labels"], int(arrays["num_train"])
    return Split(images[:n], labels[:n]), Split(images[n:], labels[n:])


def decode(path: str) -> np.ndarray:
    """Reads one image as uint8 [28, 28], checksums included where the format has them."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError(
            "Image folders are decoded by Pillow; install it with "
            "`pip install 'moejax[experiments]'`."
        ) from error
    try:
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # decoding alone overlooks some damage that the checksums of PNG show
        with Image.open(io.BytesIO(content)) as image:
            mode, pixels = image.mode, np.asarray(image.convert("L"))
    except Exception as error:  # a damaged file may raise anything from within a decoder
        raise ValueError(
            f"{path} must be a readable PNG or JPEG image, got: {error}; copy it again."
        ) from error
    if pixels.shape != (28, 28) or mode not in EXACT_MODES:
        raise ValueError(
            f"{path} must be a grey image of 28x28 pixels, got mode {mode!r} and shape "
            f"{pixels.shape}; convert it to 8-bit grey."
        )
    return pixels


def fingerprint(split: Split) -> str:
    """SHA-256 of the (label, pixels) records in sorted order."""
    labels = split.labels.astype(np.uint8)[:, None]
    records = np.concatenate([labels, split.images.reshape(len(labels), -1)], axis=1)  # [N, 785]
    ordered = np.sort(records.view("V785").ravel())
    return hashlib.sha256(ordered.tobytes()).hexdigest()
