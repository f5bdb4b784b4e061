"""A small data set in the form of MNIST, and its files as bytes."""

import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Split, idx


class SmallMnist(NamedTuple):
    folder: Path
    train: Split
    test: Split
    contents: dict  # name -> the bytes of the raw file
    digests: dict  # name -> their SHA-256


def random_split(seed, size):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 28, 28), np.uint8)
    return Split(images, rng.permutation(size).astype(np.int32) % 10)


def idx_bytes(array):
    """The file format in one expression: two zeros, uint8, rank, sizes, values."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_small_mnist(folder, train_size=30, test_size=20, seed=0, compress=True):
    train, test = random_split(seed, train_size), random_split(seed + 1, test_size)
    return write_mnist(folder, train, test, compress)


def write_mnist(folder, train, test, compress=True):
    arrays = (train.images, train.labels, test.images, test.labels)
    contents = dict(zip(idx.NAMES, map(idx_bytes, arrays), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return SmallMnist(folder, train, test, contents, digests)
