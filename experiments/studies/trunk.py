"""A convolutional trunk that two cores can train."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import linen

from parts.convolutional import convolve_by_slices

MARGIN = 2  # pixels left out at every side, where few digits have ink


class Convolution(NamedTuple):
    """A convolution of the trunk.

    Attributes:
        channels: that it returns.
        window: its height and width, in pixels.
        pooled: whether only the largest of every 2 x 2 pixels is kept.
    """

    channels: int
    window: int
    pooled: bool


CONVOLUTIONS = (
    Convolution(24, window=5, pooled=True),  # 24 x 24 -> 12 x 12
    Convolution(48, window=3, pooled=True),  # 6 x 6
    Convolution(96, window=3, pooled=False),
    Convolution(96, window=3, pooled=True),  # 3 x 3
    Convolution(128, window=3, pooled=False),
)
FEATURES = CONVOLUTIONS[-1].channels


class Trunk(linen.Module):
    """Convolutions with batch normalisation and ReLU, and the mean over the pixels that are left.

    The means are normalised, too: a router sees features around zero, and so prefers no expert
    before it has learnt to.
    """

    @linen.compact
    def __call__(self, images: jax.Array | np.ndarray, training: bool) -> jax.Array:
        """Images, uint8 or float32 in [0, 255], [N, 28, 28] -> features [N, FEATURES]."""
        norm = partial(linen.BatchNorm, use_running_average=not training, momentum=0.95)
        inside = slice(MARGIN, -MARGIN)
        x = images[:, inside, inside, None] / 255
        for channels, window, pooled in CONVOLUTIONS:
            # One channel is slow to convolve, and has few slices.
            convolve = convolve_by_slices if x.shape[-1] == 1 else None
            conv = partial(linen.Conv, use_bias=False, conv_general_dilated=convolve)
            x = conv(channels, (window, window))(x)
            x = jax.nn.relu(norm()(largest_of_four(x) if pooled else x))
        return norm()(x.mean(axis=(1, 2)))


def largest_of_four(x: jax.Array) -> jax.Array:
    """Every 2 x 2 pixels made one, ``[N, H, W, channels] -> [N, H/2, W/2, channels]``.

    With `linen.max_pool` a gradient of the trunk took a third longer on CPU.
    """
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
