"""Images distorted at random, for a network to learn from."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

DEGREES, SCALE, PIXELS = 12, 0.1, 2  # of turning, scaling and shifting, at most
BEND = 0.5  # pixels: the standard deviation of bending, where it is drawn
NODES = 4  # of a row and of a column, at which bending is drawn


def distorted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Every image turned, scaled, shifted and bent at random, by bilinear interpolation.

    Args:
        key: from which angles, scales, shifts and bends are drawn.
        images: uint8, shape [N, H, W].

    Returns:
        Images in [0, 255], float32, shape [N, H, W], black where they reach beyond the old ones.
    """
    turn_key, bend_key = jax.random.split(key)
    count, *size = images.shape
    sources = turned(turn_key, count, size) + bends(bend_key, count, size)
    return jax.vmap(lambda image, source: map_coordinates(image, [*source], order=1))(
        images.astype(jnp.float32), sources
    )


def turned(key: jax.Array, count: int, size: list[int]) -> jax.Array:
    """Where every pixel of a turned, scaled and shifted image comes from, [N, 2, H, W]."""
    keys = jax.random.split(key, 3)
    uniform = partial(jax.random.uniform, minval=-1)
    angle = jnp.radians(DEGREES) * uniform(keys[0], (count,))
    scale = 1 + SCALE * uniform(keys[1], (count,))
    shift = PIXELS * uniform(keys[2], (count, 2))
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    centre = (jnp.array(size) - 1) / 2
    pixels = jnp.moveaxis(jnp.indices(size), 0, -1) - centre  # [H, W, 2]
    sources = jnp.einsum("ijn,hwj->nihw", scale * turn, pixels)
    return sources + (centre + shift)[:, :, None, None]


def bends(key: jax.Array, count: int, size: list[int]) -> jax.Array:
    """Displacements in pixels, drawn at a few nodes and smooth between them, [N, 2, H, W].

    References:
        Simard et al., 2003, "Best Practices for Convolutional Neural Networks Applied to Visual
        Document Analysis": elastic distortion.
    """
    nodes = BEND * jax.random.normal(key, (count, 2, NODES, NODES))
    return jax.image.resize(nodes, (count, 2, *size), "cubic")
