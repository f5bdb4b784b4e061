"""Layouts of images and labels: pure functions of numpy or JAX arrays, usable inside ``jit``."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np

A = TypeVar("A", np.ndarray, jax.Array)


def flat(images: A) -> A:
    """One row of pixels in [0, 1] per image.

    Args:
        images: uint8, shape [..., H, W].

    Returns:
        ``images / 255`` in float32, shape [..., H * W].

    Raises:
        ValueError: if the images are not uint8.

    Example:
        >>> flat(np.full((5, 28, 28), 255, np.uint8)).shape
        (5, 784)
    """
    return _unit_interval(images).reshape(*images.shape[:-2], -1)


def channels_first(images: A) -> A:
    """Images in [0, 1] with one channel before height and width, as in PyTorch's convolutions.

    Args:
        images: uint8, shape [..., H, W].

    Returns:
        ``images / 255`` in float32, shape [..., 1, H, W].

    Raises:
        ValueError: if the images are not uint8.

    Example:
        >>> channels_first(np.zeros((5, 28, 28), np.uint8)).shape
        (5, 1, 28, 28)
    """
    return _unit_interval(images)[..., None, :, :]


def channels_last(images: A) -> A:
    """Images in [0, 1] with one channel after height and width, as in Flax's convolutions.

    Args:
        images: uint8, shape [..., H, W].

    Returns:
        ``images / 255`` in float32, shape [..., H, W, 1].

    Raises:
        ValueError: if the images are not uint8.

    Example:
        >>> channels_last(np.zeros((5, 28, 28), np.uint8)).shape
        (5, 28, 28, 1)
    """
    return _unit_interval(images)[..., None]


def one_hot(labels: A, num_classes: int = 10) -> A:
    """Labels as indicator vectors: ``y_nc = 1`` where ``labels_n = c``, else 0.

    Args:
        labels: integers in [0, num_classes), shape [...].
        num_classes: the length of each vector.

    Returns:
        float32, shape [..., num_classes].

    Example:
        >>> one_hot(np.array([2, 0]), 3)
        array([[0., 0., 1.],
               [1., 0., 0.]], dtype=float32)
    """
    classes = np.arange(num_classes, dtype=labels.dtype)
    classes = classes.reshape(*[1] * labels.ndim, num_classes)
    return (labels[..., None] == classes).astype(np.float32)


def _unit_interval(images: A) -> A:
    if images.dtype != np.uint8:
        raise ValueError(
            f"`images` must be uint8, as the loaders return them, got {images.dtype}; "
            "lay out the original images, once."
        )
    return images.astype(np.float32) / 255
