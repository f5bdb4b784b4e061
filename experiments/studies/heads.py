"""Four heads of equal size, which turn the features of an image into logits of its digit.

Their sizes are those of Rokah et al. 2026: one hidden layer of 512 units, or eight experts of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

import moejax
from parts.routes import load, nothing

NAMES = ("dense", "soft", "top-2", "top-1")
HIDDEN, EXPERTS, DIGITS = 512, 8, 10


class Head(NamedTuple):
    """A head.

    Attributes:
        layer: ``apply(params, features) -> (logits [N, 10], decision)``; the decision of one
            network is None.
        balance: ``decision -> scalar``, added to the loss in training.
        active: the share of its experts that serve an image.
    """

    layer: moejax.Layer
    balance: Callable[[Any], jax.Array]
    active: float


def heads(features: int) -> dict[str, Head]:
    """All four, for this many features."""
    return {
        "dense": Head(one_network(features), nothing, 1.0),
        "soft": Head(mixture(features, moejax.softmax), nothing, 1.0),
        "top-2": Head(mixture(features, partial(moejax.top_k, k=2)), load, 2 / EXPERTS),
        "top-1": Head(mixture(features, moejax.switch), load, 1 / EXPERTS),
    }


def shade(name: str) -> str:
    """The colour of a head in pictures."""
    from moejax.plot import color

    return color(NAMES.index(name))


def one_network(features: int) -> moejax.Layer:
    """An mlp that decides nothing."""
    layer = moejax.mlp(features, HIDDEN, DIGITS)
    return moejax.Layer(layer.init, lambda params, x: (layer.apply(params, x), None))


def mixture(features: int, route: moejax.base.Rule) -> moejax.Layer:
    """Eight networks, an eighth as wide each, behind a linear router."""
    return moejax.moe(
        moejax.mlp(features, HIDDEN // EXPERTS, DIGITS),
        moejax.linear(features, EXPERTS),
        num_experts=EXPERTS,
        route=route,
    )
