"""The toy problem: two Gaussian clouds, and a circle that cuts through both."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Points(NamedTuple):
    """Labelled points of the plane.

    Attributes:
        x: coordinates, float32, shape [N, 2].
        y: labels, 0 or 1, float32, shape [N].
    """

    x: jax.Array
    y: jax.Array


def toy(key: jax.Array, num_samples: int = 1000) -> Points:
    """Samples the toy problem, which no single linear boundary solves.

    Half of the points come from ``N([3, 2], I)``, half from ``N([-3, 2], I)``. The label is
    ``y = 1`` where ``|x|^2 > 13``; after that, 2 is subtracted from the second coordinate, so that
    the clouds lie at ``[3, 0]`` and ``[-3, 0]`` and the boundary is the circle of radius
    ``sqrt(13)`` around ``[0, -2]``.

    The two clouds alternate, so that every run of consecutive points is balanced and the order
    carries nothing to learn from; if the number is odd, the first cloud has one point more.

    Args:
        key: the PRNG key; the same key gives the same points.
        num_samples: N, at least 1.

    Returns:
        Coordinates [N, 2] and labels [N], in float32.

    Raises:
        ValueError: if ``num_samples`` is less than 1.

    Example:
        >>> x, y = toy(jax.random.key(0), num_samples=5)
        >>> x.shape, y.shape
        ((5, 2), (5,))
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    side = jnp.where(jnp.arange(num_samples) % 2 == 0, 3.0, -3.0).astype(jnp.float32)
    means = jnp.stack([side, jnp.full_like(side, 2.0)], axis=1)  # [N, 2]
    x = means + jax.random.normal(key, (num_samples, 2), jnp.float32)
    y = (jnp.sum(x**2, axis=1) > 13).astype(jnp.float32)
    return Points(x - jnp.asarray([[0.0, 2.0]], jnp.float32), y)
