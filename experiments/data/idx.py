"""MNIST's own format: four IDX files, each checked from its magic number to its last byte."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from data.dataset import Split

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# SHA-256 of MNIST's files after decompression, so that it does not matter who compressed them.
MNIST_SHA256 = MappingProxyType(
    {
        NAMES[0]: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        NAMES[1]: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        NAMES[2]: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        NAMES[3]: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
)


class IdxFile(NamedTuple):
    """One file that passed every check it can pass alone."""

    path: Path
    values: np.ndarray  # uint8, [N, 28, 28] or [N]
    sha256: str


def find(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder: gzip before raw, ``-idx`` before ``.idx``."""
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = [folder / (spelling + end) for end in (".gz", "") for spelling in spellings]
    return next((path for path in candidates if path.is_file()), None)


def read_idx_folder(folder: Path) -> tuple[Split, Split, bool]:
    """Reads the four files, and checks each by itself and against the others.

    Returns:
        The training set, the test set, and whether they are MNIST (by SHA-256).

    Raises:
        ValueError: naming the one file that is missing, damaged or in the wrong place.
    """
    paths = {name: find(folder, name) for name in NAMES}
    for name, path in paths.items():
        if path is None:
            raise ValueError(
                f"{folder / name} (or {name}.gz) must exist beside the other IDX files, "
                "but is missing; copy it there."
            )
    with ThreadPoolExecutor(2) as pool:  # inflating and hashing release the interpreter's lock
        files = dict(zip(NAMES, pool.map(read_idx, paths.values(), NAMES), strict=True))
    is_mnist = _check_identity(files)
    train, test = (_pair(files[images], files[labels]) for images, labels in (NAMES[:2], NAMES[2:]))
    return train, test, is_mnist


def read_idx(path: Path, name: str) -> IdxFile:
    """Reads one file, raw or gzip by content, as the images or labels that its name promises."""
    content = _inflated(path)
    is_images = "images" in name
    magic, trailing, header = (0x803, (28, 28), 16) if is_images else (0x801, (), 8)
    kind = f"IDX {'images' if is_images else 'labels'}"
    found = int.from_bytes(content[:4], "big")
    if len(content) < header or found != magic:
        raise ValueError(
            f"{path} must hold {kind}, magic number {magic:#06x}, got {found:#06x} in "
            f"{len(content)} bytes; replace it with the file of that name."
        )
    count, *sizes = (int(n) for n in np.frombuffer(content, ">u4", header // 4 - 1, offset=4))
    if tuple(sizes) != trailing or count < 1:
        expected = "[N, 28, 28]" if is_images else "[N]"
        raise ValueError(
            f"{path} must hold {kind} of shape {expected} with N at least 1, got "
            f"{[count, *sizes]}; give data of MNIST's format."
        )
    expected_bytes = header + count * int(np.prod(trailing, dtype=int))
    if len(content) != expected_bytes:
        raise ValueError(
            f"{path} must hold {expected_bytes} bytes for its {count} entries, got "
            f"{len(content)}: it is truncated or damaged; copy it again."
        )
    values = np.frombuffer(content, np.uint8, offset=header).reshape(count, *trailing)
    if not is_images and values.max() > 9:
        raise ValueError(
            f"{path} must hold labels from 0 to 9, got {values.max()}; "
            "it is damaged, or no set of ten classes."
        )
    return IdxFile(path, values, hashlib.sha256(content).hexdigest())


def _inflated(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} must be a readable file, raw or gzip, got: {error}; copy it again."
        ) from error


def _check_identity(files: dict[str, IdxFile]) -> bool:
    """Whether all files are MNIST's. A folder where only some are has a wrong file in it."""
    owners = {digest: name for name, digest in MNIST_SHA256.items()}
    for name, file in files.items():
        owner = owners.get(file.sha256, name)
        if owner != name:
            raise ValueError(
                f"{file.path} must hold MNIST's {name}, got MNIST's {owner}: "
                "the files are mixed up; give each its own name."
            )
    if files[NAMES[0]].sha256 == files[NAMES[2]].sha256:
        raise ValueError(
            f"{files[NAMES[2]].path} must hold other images than {files[NAMES[0]].path.name}, "
            "got the same; the files are mixed up."
        )
    wrong = [name for name, file in files.items() if file.sha256 != MNIST_SHA256[name]]
    if wrong and len(wrong) < len(files):
        file = files[wrong[0]]
        raise ValueError(
            f"{file.path} must be MNIST's like other files beside it, with SHA-256 "
            f"{MNIST_SHA256[wrong[0]]} when decompressed, got {file.sha256}; it is damaged or "
            "from another data set: replace it."
        )
    return not wrong


def _pair(images: IdxFile, labels: IdxFile) -> Split:
    if len(images.values) != len(labels.values):
        raise ValueError(
            f"{labels.path} must hold one label for each of the {len(images.values)} images of "
            f"{images.path.name}, got {len(labels.values)}; the files are mixed up."
        )
    return Split(images.values, labels.values.astype(np.int32))
