"""Image folders: one folder per digit under ``train`` and ``test``, PNG or JPEG."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data.cache import cache_dir, read_checked, store_checked
from data.dataset import Split
from data.packages import missing
from parts.progress import progress

SPLITS = (("train", "training"), ("test", "testing"))
DIGITS = frozenset(map(str, range(10)))
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
OTHER_IMAGES = (".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
EXACT_MODES = ("L", "1", "P", "RGB")  # those that Pillow turns into 8-bit grey without loss

# SHA-256 of MNIST's (label, pixels) records in sorted order, so that file names do not matter.
MNIST_SHA256 = (
    "da6370735bf1d490f086dde49c15f2ed0480ad05dc7c70abf5d36bf471d5e312",
    "0c7bc63f656fb2440dc2b5bea4ff3ac8632e305b73ec1dc88141a32d36204fac",
)

# Per digit folder, train 0-9 and then test 0-9: (name, bytes, modification time, change time) of
# every image. Writing a file moves its change time, which no program can set back.
Scan = dict[Path, list[tuple[str, int, int, int]]]


def is_tree(folder: Path) -> bool:
    """Whether the folder has a training folder in it."""
    return bool(_named(folder, SPLITS[0]))


def is_stray(name: str) -> bool:
    """Whether a folder is a system's or an archiver's: hidden, ``__MACOSX``, ``@eaDir``."""
    return name.startswith((".", "_", "@"))


def read_tree(folder: Path) -> tuple[Split, Split, bool]:
    """Decodes every image of the folder, or reuses what was decoded from the very same files.

    The decoded images are cached, one file per folder, and belong to the path, size, modification
    and change time of every image. Digits take turns, each in the order of file names: the first
    examples are of all digits, however many are taken.

    Returns:
        The training set, the test set, and whether they are MNIST (by SHA-256, in any order).

    Raises:
        ValueError: naming the folder or image that is missing, damaged or of the wrong shape.
        ImportError: if Pillow is not installed.
    """
    folder = folder.resolve()
    files = scan(folder)
    key = hashlib.sha256(repr(list(files.items())).encode()).hexdigest()
    cached = cache_dir() / "images" / hashlib.sha256(str(folder).encode()).hexdigest()
    if (content := read_checked(cached)) is not None:
        header, pixels = _split_header(content)
        if header["key"] == key:
            return *_splits(pixels, files), header["is_mnist"]
    images = np.stack(list(_decode_all(files)))
    if scan(folder) != files:
        raise ValueError(f"{folder} must not change while it is read, but did; load it again.")
    train, test = _splits(images, files)
    is_mnist = (fingerprint(train), fingerprint(test)) == MNIST_SHA256
    line = json.dumps({"key": key, "is_mnist": is_mnist}).encode() + b"\n"
    store_checked(cached, line + images.tobytes())
    return train, test, is_mnist


def scan(folder: Path) -> Scan:
    """Lists the images of every digit of both splits, ordered by name."""
    return {
        directory: _scan_digit(directory)
        for names in SPLITS
        for directory in _digit_folders(_split_folder(folder, names))
    }


def decode(path: Path) -> np.ndarray:
    """Reads one image as uint8 [28, 28], checksums included where the format has them."""
    image_module = _pillow()
    try:
        content = path.read_bytes()
        with image_module.open(io.BytesIO(content)) as image:
            image.verify()  # decoding alone overlooks some damage that the checksums of PNG show
        with image_module.open(io.BytesIO(content)) as image:
            mode, opaque = image.mode, "transparency" not in image.info
            pixels = np.asarray(image.convert("L") if opaque else image)
    except Exception as error:  # a damaged file may raise anything from within a decoder
        raise ValueError(
            f"{path} must be a readable PNG or JPEG image, got {type(error).__name__}; "
            "copy it again."
        ) from error
    if not opaque:
        raise ValueError(
            f"{path} must be an opaque image, got a transparent colour; save it on a background."
        )
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


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path:
    found = _named(folder, names)
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold exactly one folder named {' or '.join(names)}, got {len(found)}; "
            "keep one folder of images per split."
        )
    return found[0]


def _named(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders of these names, in upper or lower case."""
    return [path for path in folder.iterdir() if path.name.lower() in names and path.is_dir()]


def _digit_folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        found = {e.name for e in entries if e.is_dir() and not is_stray(e.name)}
    if found != DIGITS:
        absent, extra = sorted(DIGITS - found), sorted(found - DIGITS)
        raise ValueError(
            f"{folder} must hold one folder per digit, 0 to 9, got {absent} missing and "
            f"{extra} besides; put each image under its digit."
        )
    return [folder / str(digit) for digit in range(10)]


def _scan_digit(folder: Path) -> list[tuple[str, int, int, int]]:
    with os.scandir(folder) as entries:
        files = sorted(_stamp(entry) for entry in entries if _is_image(entry))
    if not files:
        raise ValueError(f"{folder} must hold PNG or JPEG images, got none; put images there.")
    return files


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether to read an entry of a digit's folder; refuses what may be meant as an image."""
    if entry.name.startswith(".") or (entry.is_dir() and is_stray(entry.name)):
        return False
    if entry.is_dir() or entry.name.lower().endswith(OTHER_IMAGES):
        raise ValueError(
            f"{entry.path} must be a PNG or JPEG image; convert it, or move it elsewhere."
        )
    return entry.name.lower().endswith(IMAGE_ENDINGS)


def _stamp(entry: os.DirEntry[str]) -> tuple[str, int, int, int]:
    stat = entry.stat()
    return entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _decode_all(files: Scan) -> Iterator[np.ndarray]:
    paths = [folder / name for folder, images in files.items() for name, *_ in images]
    return map(decode, progress(paths, "decoding images"))


def _split_header(content: memoryview) -> tuple[dict[str, Any], np.ndarray]:
    header = bytes(content[:1024]).split(b"\n", 1)[0]
    images = np.frombuffer(content, np.uint8, offset=len(header) + 1).reshape(-1, 28, 28)
    return json.loads(header), images


def _splits(images: np.ndarray, files: Scan) -> tuple[Split, Split]:
    counts = [len(names) for names in files.values()]
    labels = np.repeat(np.arange(20, dtype=np.int32) % 10, counts)
    n = sum(counts[:10])
    train, test = Split(images[:n], labels[:n]), Split(images[n:], labels[n:])
    return _taking_turns(train, counts[:10]), _taking_turns(test, counts[10:])


def _taking_turns(split: Split, counts: list[int]) -> Split:
    """The first example of every digit, then the second of every digit, and so on."""
    places = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(places, kind="stable")
    return Split(split.images[order], split.labels[order])


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing("pillow", "Images are decoded by it") from error
    return Image
