"""Chen et al.'s networks: a single convolution over patches, and eight behind a noisy router."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax
from studies.clusters_data import PATCHES, WIDTH

EXPERTS, FILTERS, CLASSES = 8, 8, 2  # filters per class of an expert
SINGLE_FILTERS = 40  # per class of a single network
SMALL = 1e-3  # what the experts' first weights are multiplied by


class Kind(NamedTuple):
    """Cubic or linear filters, as pure functions.

    Attributes:
        tokens: ``patches [N, P, D] -> tokens [N, ...]``, what networks and router read.
        filtered: ``(params, tokens) -> [N, filters]``, summed over patches.
    """

    tokens: Callable[[jax.Array], jax.Array]
    filtered: Callable[[Any, jax.Array], jax.Array]


def flat(x: jax.Array) -> jax.Array:
    """All patches of an example in one row, [N, P D]."""
    return x.reshape(len(x), -1)


def cubes(params: Any, x: jax.Array) -> jax.Array:
    """``sum_p (x_p W + b)^3``."""
    hidden = x.reshape(-1, WIDTH) @ params["kernel"] + params["bias"]
    return (hidden * hidden * hidden).reshape(len(x), PATCHES, -1).sum(axis=1)


def patch_sum(x: jax.Array) -> jax.Array:
    """``sum_p x_p``, [N, D], which is all that a linear filter can tell of the patches."""
    return x.sum(axis=1)


def sums(params: Any, x: jax.Array) -> jax.Array:
    """``sum_p (x_p W + b)``, of the sum of the patches."""
    return x @ params["kernel"] + PATCHES * params["bias"]


CUBIC, LINEAR = Kind(flat, cubes), Kind(patch_sum, sums)


def convolution(kind: Kind, filters: int, scale: float = 1.0) -> moejax.Layer:
    """``o_c = sum_(filters j of class c) sum_p a(w_j x_p + b_j)``: two scores per example.

    Args:
        kind: cubic or linear.
        filters: per class.
        scale: of the first weights, relative to PyTorch's ``U(-1/sqrt(D), 1/sqrt(D))``.
    """

    def init(key: jax.Array) -> Any:
        limit = scale / math.sqrt(WIDTH)
        shapes = {"kernel": (WIDTH, CLASSES * filters), "bias": (CLASSES * filters,)}
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.uniform(one, shape, minval=-limit, maxval=limit)
            for one, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return kind.filtered(params, x).reshape(len(x), CLASSES, -1).sum(axis=-1)

    return moejax.Layer(init, apply)


def patch_router() -> moejax.Layer:
    """``h_e = sum_p theta_e x_p``, zero at first."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, WIDTH).sum(axis=1) @ params

    return moejax.Layer(lambda key: jnp.zeros((WIDTH, EXPERTS)), apply)


def noisy_switch(logits: jax.Array, *, key: jax.Array | None = None) -> moejax.Routing:
    """The best of ``h + r``, r uniform in [0, 1], weighted by ``h_e + r_e`` itself.

    Without a key there is no noise. The paper weights by a softmax; its published numbers were
    obtained with this.
    """
    if key is not None:
        logits = logits + jax.random.uniform(key, logits.shape, logits.dtype)
    return moejax.by_score(logits, k=1, score=lambda logits: logits, renormalize=False)


def mixture(kind: Kind) -> moejax.Layer:
    """Eight convolutions of 16 filters, of which a router chooses one."""
    return moejax.moe(
        convolution(kind, FILTERS, SMALL),
        patch_router(),
        num_experts=EXPERTS,
        route=noisy_switch,
    )
