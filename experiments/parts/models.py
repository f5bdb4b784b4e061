"""The models of the MNIST experiment: one network, and three mixtures of such networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

import moejax
from data import channels_last, flat
from parts.routes import ROUTES, importance_and_load, load, with_noise

PIXELS, DIGITS = 28 * 28, 10
Execute = Callable[..., jax.Array]


class Model(NamedTuple):
    """A classifier of images with what its training needs.

    Attributes:
        init: ``key -> params``.
        apply: ``(params, images uint8 [N, 28, 28], key, mask=None) -> (logits [N, 10], routing)``;
            the routing of a model without a gate is None.
        balance: ``routing -> scalar``, added to the cross-entropy.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., tuple[jax.Array, moejax.Routing | None]]
    balance: Callable[[Any], jax.Array | float]


class Kind(NamedTuple):
    """What the experts are: their layer, how they see an image, and how a router sees it."""

    expert: moejax.Layer
    view: Callable[[jax.Array], jax.Array]
    feature_ndim: int


def mlp_expert(hidden: int) -> Kind:
    """784-hidden-10 on flat images."""
    return Kind(moejax.mlp(PIXELS, hidden, DIGITS), flat, 1)


def conv_expert(hidden: int) -> Kind:
    """Two strided convolutions and two dense layers, a Flax module, on 28x28x1."""
    from moejax.interop.flax import from_nnx
    from parts.convolutional import Convolutional  # loads flax

    return Kind(from_nnx(partial(Convolutional, hidden, DIGITS)), channels_last, 3)


def dense(kind: Kind, num_experts: int, top_k: int, execute: Execute | None) -> Model:
    """One network and no gate: the baseline."""

    def apply(
        params: Any, images: jax.Array, key: jax.Array | None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        return kind.expert.apply(params, kind.view(images)), None

    return Model(kind.expert.init, apply, lambda routing: 0.0)


def soft(kind: Kind, num_experts: int, top_k: int, execute: Execute | None) -> Model:
    """Every expert runs; the gate's probabilities blend their logits."""
    router = linear_router(num_experts)  # with K = E there is nothing sparse to execute
    return mixture(kind, num_experts, router, moejax.softmax, None, lambda routing: 0.0)


def sparse(kind: Kind, num_experts: int, top_k: int, execute: Execute | None) -> Model:
    """Noisy top-k with learned noise, importance and load balancing."""
    router = with_noise(linear_router(num_experts))
    route = partial(moejax.noisy_top_k, k=top_k)
    return mixture(kind, num_experts, router, route, execute, importance_and_load)


def hard(kind: Kind, num_experts: int, top_k: int, execute: Execute | None) -> Model:
    """One expert per image, weighted by its probability."""
    return mixture(kind, num_experts, linear_router(num_experts), moejax.switch, execute, load)


def by_rule(name: str, kind: Kind, num_experts: int, top_k: int, execute: Execute | None) -> Model:
    """A mixture with any of the rules of `ROUTES`."""
    route = ROUTES[name]
    router = route.router(linear_router(num_experts))
    return mixture(kind, num_experts, router, route.rule(top_k), execute, route.balance)


MODELS = {"dense": dense, "soft": soft, "sparse": sparse, "hard": hard}
TAKE_TOP_K = ("sparse",)
RUN_ALL = ("soft", "all", "softmax", "softmax-information")  # every expert sees every image
EXPERTS = {"mlp": mlp_expert, "conv": conv_expert}
CONVOLVED = {"mlp": 0, "conv": 14 * 14 * 8 + 7 * 7 * 16}  # numbers that an expert makes of an image


def mixture(
    kind: Kind,
    num_experts: int,
    router: moejax.Layer,
    route: Callable[..., moejax.Routing],
    execute: Execute | None,
    balance: Callable[[moejax.Routing], jax.Array | float],
) -> Model:
    """A mixture of experts as a classifier."""
    layer = moejax.moe(
        kind.expert,
        router,
        num_experts=num_experts,
        route=route,
        execute=execute,
        feature_ndim=kind.feature_ndim,
    )

    def apply(
        params: Any, images: jax.Array, key: jax.Array | None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, moejax.Routing]:
        return layer.apply(params, kind.view(images), key=key, mask=mask)

    return Model(layer.init, apply, balance)


def linear_router(num_experts: int) -> moejax.Layer:
    """One logit per expert from all pixels, whatever the layout of the image."""
    linear = moejax.linear(PIXELS, num_experts)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return linear.apply(params, x.reshape(len(x), PIXELS))

    return moejax.Layer(linear.init, apply)
