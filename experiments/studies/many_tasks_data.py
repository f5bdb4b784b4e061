"""Ma et al.'s synthetic tasks: two regressions whose weights have a chosen cosine."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTH = 100
NOISE = 0.1  # standard deviation
# The paper leaves these open: the frequencies and phases of the sines, and the scale c, which is 1.
FREQUENCIES, PHASES = (1.0, 2.0), (0.0, 1.0)


class Batch(NamedTuple):
    """Inputs x [N, D] and the targets of both tasks y [2, N]."""

    x: jax.Array
    y: jax.Array


def weights(key: jax.Array, correlation: jax.Array | float) -> jax.Array:
    """``w_1 = u_1`` and ``w_2 = p u_1 + sqrt(1 - p^2) u_2``, [2, D], u orthonormal and random."""
    u, _ = jnp.linalg.qr(jax.random.normal(key, (WIDTH, 2)))
    p = jnp.asarray(correlation, u.dtype)
    return jnp.stack([u[:, 0], p * u[:, 0] + jnp.sqrt(1 - p**2) * u[:, 1]])


def batch(key: jax.Array, weights: jax.Array, count: int) -> Batch:
    """``y_k = w_k x + sum_i sin(a_i w_k x + b_i) + e``, x standard normal.

    Args:
        key: the PRNG key.
        weights: w, [2, D].
        count: N.

    Returns:
        The inputs, which both tasks share, and the targets.

    References:
        Ma et al., `Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts <https://doi.org/10.1145/3219819.3220007>`_, 2018
    """
    x_key, noise_key = jax.random.split(key)
    x = jax.random.normal(x_key, (count, WIDTH))
    along = weights @ x.T  # [2, N]
    waves = sum(jnp.sin(a * along + b) for a, b in zip(FREQUENCIES, PHASES, strict=True))
    return Batch(x, along + waves + NOISE * jax.random.normal(noise_key, along.shape))
