"""Chen et al.'s data: four patches, of which one tells the label and one tells the cluster.

The constants are those of the authors' notebooks, https://github.com/uclaml/MoE, which also
multiply every example by ten.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLUSTERS, PATCHES, WIDTH = 4, 4, 50
SCALE = 10.0
SIGNAL, CENTRE = (0.5, 2.0), (1.0, 2.0)  # ranges of alpha and beta


class Setting(NamedTuple):
    """What differs between the four settings.

    Attributes:
        distractor: the range of gamma, the length of another cluster's feature.
        noise: sigma, the length of the noise patch.
    """

    distractor: tuple[float, float]
    noise: float


SETTINGS = {
    1: Setting((0.5, 3.0), 1.0),
    2: Setting((0.5, 3.0), 2.0),
    3: Setting((0.5, 2.0), 1.0),
    4: Setting((0.5, 2.0), 2.0),
}


class Directions(NamedTuple):
    """Orthonormal directions, each [clusters, width]: the features v and the centres c."""

    features: jax.Array
    centres: jax.Array


class Examples(NamedTuple):
    """Labelled examples of clusters.

    Attributes:
        x: patches, float32, shape [N, P, D].
        label: 0 or 1, int32, shape [N].
        cluster: int32, shape [N].
    """

    x: jax.Array
    label: jax.Array
    cluster: jax.Array


def directions(key: jax.Array) -> Directions:
    """Eight random directions, orthonormal."""
    square = jax.random.normal(key, (WIDTH, 2 * CLUSTERS))
    columns, _ = jnp.linalg.qr(square)
    return Directions(columns.T[:CLUSTERS], columns.T[CLUSTERS:])


def examples(key: jax.Array, basis: Directions, setting: Setting, count: int) -> Examples:
    """Samples labels ``y`` of ±1, clusters ``k`` and others ``k' != k``, and makes patches of them.

    The four patches, in random order and times ten, are the feature ``alpha y v_k``, the centre
    ``beta c_k``, the distractor ``gamma s v_k'`` with a random sign s, and noise of the
    distribution ``N(0, sigma^2 I / D)``.

    Args:
        key: the PRNG key.
        basis: v and c.
        setting: gamma's range and sigma.
        count: N.

    Returns:
        The examples; label 1 stands for ``y = 1``.

    References:
        Chen et al., `Towards Understanding the Mixture-of-Experts Layer in Deep Learning
        <https://arxiv.org/abs/2208.02813>`_, 2022
    """
    keys = jax.random.split(key, 9)
    cluster = jax.random.randint(keys[0], (count,), 0, CLUSTERS)
    other = (cluster + jax.random.randint(keys[1], (count,), 1, CLUSTERS)) % CLUSTERS
    y, sign = (jax.random.rademacher(one, (count, 1), jnp.float32) for one in keys[2:4])
    alpha, beta, gamma = (
        jax.random.uniform(one, (count, 1), minval=low, maxval=high)
        for one, (low, high) in zip(keys[4:7], (SIGNAL, CENTRE, setting.distractor), strict=True)
    )
    noise = setting.noise / math.sqrt(WIDTH) * jax.random.normal(keys[7], (count, WIDTH))
    patches = [
        alpha * y * basis.features[cluster],
        beta * basis.centres[cluster],
        gamma * sign * basis.features[other],
        noise,
    ]
    x = shuffled(keys[8], SCALE * jnp.stack(patches, axis=1))  # [N, P, D]
    return Examples(x, (y[:, 0] > 0).astype(jnp.int32), cluster)


def shuffled(key: jax.Array, x: jax.Array) -> jax.Array:
    """Every example's patches in an order of its own."""
    order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)  # [N, P]
    return jnp.take_along_axis(x, order[:, :, None], axis=1)
