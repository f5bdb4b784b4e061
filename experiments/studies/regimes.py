"""One-dimensional regression with four regimes, each with its own line and noise."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EDGES = np.array([-1.0, 0.0, 1.0])  # between the regimes of [-2, 2]
SLOPES = np.array([2.0, -1.0, 0.5, -3.0])
LEVELS = np.array([3.0, -1.0, 1.0, 4.0])  # of each line at 0
NOISES = np.array([0.1, 0.3, 0.05, 0.2])


class Pairs(NamedTuple):
    """Inputs [N, D] and targets, [N, 1] to regress or [N] of zeros and ones to classify."""

    x: jax.Array
    y: jax.Array


def regimes(key: jax.Array, count: int) -> Pairs:
    """``y = a_r + b_r x + s_r e``, x uniform in [-2, 2], r its regime and e standard normal.

    Args:
        key: the PRNG key.
        count: N.

    Returns:
        x [N, 1] and y [N, 1].
    """
    x_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (count, 1), minval=-2.0, maxval=2.0)
    regime = jnp.searchsorted(jnp.asarray(EDGES, x.dtype), x)
    level, slope, noise = (jnp.asarray(one, x.dtype)[regime] for one in (LEVELS, SLOPES, NOISES))
    return Pairs(x, level + slope * x + noise * jax.random.normal(noise_key, x.shape, x.dtype))


def truth(x: np.ndarray) -> np.ndarray:
    """The lines without noise."""
    regime = np.searchsorted(EDGES, x)
    return LEVELS[regime] + SLOPES[regime] * x
