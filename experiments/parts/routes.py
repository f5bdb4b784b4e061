"""The rules that suit a classifier of images, each with its router and its balance losses.

The others are left out: hash routing would need token ids, and expert choice and Soft MoE let the
images of a batch see one another, so that a prediction would depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax

Balance = Callable[[moejax.Routing], jax.Array]


class Route(NamedTuple):
    """How images find their experts.

    Attributes:
        router: makes the router of a plain one, ``x -> logits [N, E]``.
        rule: ``logits -> Routing``, given the number of experts per image.
        balance: ``routing -> scalar``, added to the cross-entropy.
    """

    router: Callable[[moejax.Layer], moejax.Layer]
    rule: Callable[[int], Callable[..., moejax.Routing]]
    balance: Balance


def unchanged(router: moejax.Layer) -> moejax.Layer:
    """The plain router."""
    return router


def with_noise(router: moejax.Layer) -> moejax.Layer:
    """The plain router, and one more for the scale of the noise."""
    return moejax.noisy(router, router)


def nothing(*decision: Any) -> jax.Array:
    """No balance loss, whatever has been decided."""
    return jnp.zeros(())


def load(routing: moejax.Routing) -> jax.Array:
    """The weight that Switch Transformers give to load balancing."""
    return 0.01 * moejax.load_balancing_loss(routing)


def importance_and_load(routing: moejax.Routing) -> jax.Array:
    """Importance and load balancing, at 0.01 each."""
    return 0.01 * moejax.importance_loss(routing) + load(routing)


def importance_and_smooth_load(routing: moejax.Routing) -> jax.Array:
    """Importance and smooth load, at 0.01 each."""
    return 0.01 * (moejax.importance_loss(routing) + moejax.load_loss(routing))


def information(routing: moejax.Routing) -> jax.Array:
    """What the expert tells about the image, at 0.1."""
    return 0.1 * moejax.mutual_information_loss(routing)


def sinkhorn(logits: jax.Array, *, k: int, key: jax.Array | None = None) -> moejax.Routing:
    """Balanced over the batch in training, where there is a key; image by image in evaluation."""
    if key is None:
        return moejax.top_k(logits, k=k, renormalize=False)
    return moejax.sinkhorn(logits, k=k)


def top_k(rule: moejax.base.Rule, **settings: object) -> Callable[[int], moejax.base.Rule]:
    """A rule whose number of experts per image is still open."""
    return lambda k: partial(rule, k=k, **settings)


def fixed(rule: moejax.base.Rule) -> Callable[[int], moejax.base.Rule]:
    """A rule that settles the number of experts by itself."""
    return lambda k: rule


def asks_for_k(route: Route) -> bool:
    """Whether the number of experts per image is open: `top_k` makes a rule for each."""
    return route.rule(1) is not route.rule(2)


ROUTES = {
    "softmax": Route(unchanged, fixed(moejax.softmax), nothing),
    "softmax-information": Route(unchanged, fixed(moejax.softmax), information),
    "top-k": Route(unchanged, top_k(moejax.top_k), load),
    "top-k-raw": Route(unchanged, top_k(moejax.top_k, renormalize=False), load),
    "switch": Route(unchanged, fixed(moejax.switch), load),
    "noisy-top-k": Route(with_noise, top_k(moejax.noisy_top_k), importance_and_smooth_load),
    "gshard-top-2": Route(unchanged, fixed(moejax.gshard_top_2), load),
    "sigmoid-top-k": Route(unchanged, top_k(moejax.sigmoid_top_k), load),
    "relu": Route(unchanged, fixed(moejax.relu), load),
    "sinkhorn": Route(unchanged, top_k(sinkhorn), nothing),
}
