"""The handwritten digits that scikit-learn carries."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset, Split
from data.packages import missing

NUM_TRAIN = 1437


def digits() -> Dataset:
    """Loads the 1,797 real 8x8 digits of scikit-learn, resampled to 28x28.

    Bilinear resampling, with pixel centres aligned, and grey values 0 to 16 rescaled to 0 to 255.
    The first 1,437 are the training set and the last 360 the test set; the file is in order of
    collection, so this keeps most writers on one side.

    Returns:
        The dataset named "digits": 1,437 training and 360 test images.

    Raises:
        ImportError: if scikit-learn is not installed.

    References:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
        Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing("scikit-learn", "The handwritten digits come with it") from error
    bunch = load_digits()
    images, labels = _enlarge(bunch.images), bunch.target.astype(np.int32)
    return Dataset(
        name="digits",
        train=Split(images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        test=Split(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
        source="the 8x8 handwritten digits of scikit-learn, resampled to 28x28",
    )


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Resamples [N, 8, 8] grey values in [0, 16] to uint8 [N, 28, 28], linearly along each axis."""
    old = images.shape[-1]
    centres = (np.arange(28) + 0.5) * old / 28 - 0.5
    weights = np.stack([np.interp(centres, np.arange(old), row) for row in np.eye(old)], axis=1)
    large = weights @ images @ weights.T  # [28, 8] @ [N, 8, 8] @ [8, 28]
    return np.rint(large * (255 / 16)).astype(np.uint8)
