"""MNIST's own format: four IDX files, each checked from its magic number to its last byte."""

from __future__ import annotations

import hashlib
import math
import os
import re
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

MOST_PER_BYTE = 1040  # bytes that one byte of gzip can inflate to, rounded up
GZIP_HEADERS = 2**17  # bytes of gzip beside the content, as for a name; more are not read
AT_ONCE = 2**22  # bytes of gzip that are inflated in one call
MOST_MEMBERS = 10_000  # of a file of gzip: some of what follows one is copied, so many take long


class Kind(NamedTuple):
    """What a file can hold: its name in errors, magic number, sizes after the first, and shape."""

    words: str
    magic: int
    trailing: tuple[int, ...]
    shape: str


IMAGES = Kind("IDX images", 0x803, (28, 28), "[N, 28, 28]")
LABELS = Kind("IDX labels", 0x801, (), "[N]")


class IdxFile(NamedTuple):
    """One file that passed every check that needs no other file."""

    path: Path
    values: np.ndarray  # uint8, [N, 28, 28] or [N]
    sha256: str


def holds_idx(folder: Path) -> bool:
    """Whether any of the four files is there, or anything else with such a name."""
    return any(find(folder, name) for name in NAMES)


def find(folder: Path, name: str) -> Path | None:
    """What has this name in the folder: gzip before raw, ``-idx`` before ``.idx``.

    Kaggle's archive unpacks to a folder per file, ``NAME/NAME``. A folder without such a file,
    or a broken link, is found too, so that it can be named.
    """
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = [folder / (spelling + end) for end in (".gz", "") for spelling in spellings]
    unpacked = [path / path.name for path in candidates]
    found = [path for path in (*candidates, *unpacked) if path.is_file()]
    return next(iter([*found, *(path for path in candidates if os.path.lexists(path))]), None)


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
    """Reads one file, raw or gzip by content, as the images or labels that its name promises.

    Nothing is read or inflated beyond the size that the header announces.
    """
    kind = IMAGES if "images" in name else LABELS
    length = 8 + 4 * len(kind.trailing)
    count = _count(path, kind, _beginning(path, length))
    size = count * math.prod(kind.trailing)
    if size > MOST_PER_BYTE * path.stat().st_size:
        raise ValueError(_of_another_size(path, size, count, "fewer"))
    whole = memoryview(_beginning(path, length + size + 1))
    content = whole[length:]
    if len(content) != size:
        got = f"{len(content):,}" if len(content) < size else "more"
        raise ValueError(_of_another_size(path, size, count, got))
    values = np.frombuffer(content, np.uint8).reshape(count, *kind.trailing)
    if kind is LABELS and values.max() > 9:
        raise ValueError(
            f"{path} must hold labels from 0 to 9, got {values.max()}; "
            "it is damaged, or no set of ten classes."
        )
    return IdxFile(path, values, hashlib.sha256(whole).hexdigest())


def _count(path: Path, kind: Kind, header: bytes) -> int:
    """The number of entries that the header of a file of this kind announces."""
    magic = int.from_bytes(header[:4], "big")
    if len(header) < 8 + 4 * len(kind.trailing) or magic != kind.magic:
        raise ValueError(
            f"{path} must hold {kind.words}, magic number {kind.magic:#06x}, got the header "
            f"{header.hex() or 'of an empty file'}; replace it with the file of that name."
        )
    count, *sizes = (int(n) for n in np.frombuffer(header, ">u4", offset=4))
    if tuple(sizes) != kind.trailing or count < 1:
        raise ValueError(
            f"{path} must hold {kind.words} of shape {kind.shape} with N at least 1, got "
            f"{[count, *sizes]}; give data of MNIST's format."
        )
    return count


def _of_another_size(path: Path, size: int, count: int, got: str) -> str:
    return (
        f"{path} must hold {size:,} bytes for its {count:,} entries, got {got}: "
        "it is truncated or damaged; copy it again."
    )


def _beginning(path: Path, most: int) -> bytes:
    """At most so many bytes of the file's content, inflated if it is gzip."""
    if path.is_dir():
        raise ValueError(f"{path} must be a file, got a folder; put the file there.")
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                return file.read(most)
            return _inflate(file.read(most + most // 1000 + GZIP_HEADERS), most)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} must be a readable file, raw or gzip, got: {error}; copy it again."
        ) from error


def _inflate(data: bytes, most: int) -> bytes:
    """At most so many bytes of what gzip holds, in few calls.

    Modules of the standard library inflate a few thousand bytes at a time, and wait for the
    interpreter's lock each time. While another thread computes, that takes longer than inflating.
    """
    content, left, at, members = [], most, 0, 0
    while at < len(data) and left:
        if members == MOST_MEMBERS:
            raise EOFError(f"more than {MOST_MEMBERS:,} members of gzip")
        member, members = zlib.decompressobj(zlib.MAX_WBITS | 16), members + 1
        while not member.eof and left:
            if at == len(data):
                raise EOFError("the file ended before gzip's end-of-stream marker")
            piece = data[at : at + AT_ONCE]
            content.append(member.decompress(piece, left))
            left -= len(content[-1])
            at += len(piece) - len(member.unused_data)
        at = _after_padding(data, at)
    return b"".join(content)


def _after_padding(data: bytes, at: int) -> int:
    """Where the zeros end that may follow a member."""
    other = re.compile(rb"[^\0]").search(data, at)
    return other.start() if other else len(data)


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
