"""The convolutional expert of the MNIST experiment."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Convolutional(nnx.Module):
    """A small convolutional network."""

    def __init__(self, hidden: int, classes: int, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, strides=2, rngs=rngs, conv_general_dilated=convolve_by_slices)
        self.first = conv(1, 8, (5, 5))
        self.second = conv(8, 16, (3, 3))
        self.hidden = nnx.Linear(7 * 7 * 16, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [N, 28, 28, 1] -> logits [N, classes]."""
        x = nnx.relu(self.second(nnx.relu(self.first(x))))  # [N, 7, 7, 16]
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def convolve_by_slices(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **_: Any
) -> jax.Array:
    """A strided convolution as one matrix product over shifted slices.

    Under `vmap` over experts a convolution becomes a grouped convolution, which took 13 times
    as long on two CPU cores (a step of 8 experts on 128 images).
    """
    window, features = kernel.shape[:2], kernel.shape[-1]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (
        [slice(k, n - size + k + 1, stride) for k in range(size)]
        for n, size, stride in zip(x.shape[1:3], window, strides, strict=True)
    )
    patches = jnp.stack([x[:, r, c] for r in rows for c in columns], axis=3)
    patches = patches.reshape(*patches.shape[:3], -1)  # [N, H, W, window * channels]
    return patches @ kernel.reshape(-1, features)
