"""Four heads of equal size on one trunk, for images of digits.

The heads are those of Rokah et al. 2026: features of width 512; one hidden layer of 512 units, or
eight experts of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax
from data import channels_last
from parts.convolutional import convolve_by_slices
from parts.routes import Balance, load, nothing

CHANNELS = (1, 8, 16, 32)
FEATURES = 4 * 4 * CHANNELS[-1]
HIDDEN, EXPERTS, DIGITS = 512, 8, 10


def trunk() -> moejax.Layer:
    """Three 3x3 convolutions of stride 2 with ReLU.

    Returns:
        A layer with ``apply(params, images uint8 [N, 28, 28]) -> features [N, FEATURES]``.
    """
    layers = [convolution(*channels) for channels in pairwise(CHANNELS)]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(layers))
        return [layer.init(one) for layer, one in zip(layers, keys, strict=True)]

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = channels_last(images)
        for layer, one in zip(layers, params, strict=True):
            x = jax.nn.relu(layer.apply(one, x))
        return x.reshape(len(x), -1)

    return moejax.Layer(init, apply)


def convolution(channels_in: int, channels_out: int) -> moejax.Layer:
    """A 3x3 convolution of stride 2, ``[N, H, W, channels_in] -> [N, H/2, W/2, channels_out]``."""
    uniform = moejax.fan_in_uniform(9 * channels_in)

    def init(key: jax.Array) -> Any:
        kernel_key, bias_key = jax.random.split(key)
        return {
            "kernel": uniform(kernel_key, (3, 3, channels_in, channels_out)),
            "bias": uniform(bias_key, (channels_out,)),
        }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        y = convolve_by_slices(x, params["kernel"], (2, 2), "SAME")
        return y + params["bias"][None, None, None]

    return moejax.Layer(init, apply)


def dense_head() -> moejax.Layer:
    """One network: ``apply(params, features) -> (logits [N, 10], 0)``, as there is no balance."""
    layer = moejax.mlp(FEATURES, HIDDEN, DIGITS)
    return moejax.Layer(layer.init, lambda params, x: (layer.apply(params, x), jnp.zeros(())))


def mixture_head(route: Callable[..., moejax.Routing], balance: Balance) -> moejax.Layer:
    """Eight networks, an eighth as wide each, behind a linear router.

    Args:
        route: the rule.
        balance: what to add to the loss in training.

    Returns:
        A layer with ``apply(params, features) -> (logits [N, 10], balance)``.
    """
    layer = moejax.moe(
        moejax.mlp(FEATURES, HIDDEN // EXPERTS, DIGITS),
        moejax.linear(FEATURES, EXPERTS),
        num_experts=EXPERTS,
        route=route,
    )

    def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, routing = layer.apply(params, x)
        return logits, balance(routing)

    return moejax.Layer(layer.init, apply)


def on_trunk(head: moejax.Layer) -> moejax.Layer:
    """A classifier, ``apply(params, images) -> (logits [N, 10], balance)``."""
    features = trunk()

    def init(key: jax.Array) -> Any:
        trunk_key, head_key = jax.random.split(key)
        return {"trunk": features.init(trunk_key), "head": head.init(head_key)}

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return head.apply(params["head"], features.apply(params["trunk"], images))

    return moejax.Layer(init, apply)


class Head(NamedTuple):
    """A head.

    Attributes:
        layer: ``apply(params, features) -> (logits [N, 10], balance)``.
        active: the share of its experts that serve an image.
    """

    layer: moejax.Layer
    active: float


HEADS = {
    "dense": Head(dense_head(), 1.0),
    "soft": Head(mixture_head(moejax.softmax, nothing), 1.0),
    "top-2": Head(mixture_head(partial(moejax.top_k, k=2), load), 2 / EXPERTS),
    "top-1": Head(mixture_head(moejax.switch, load), 1 / EXPERTS),
}
MODELS = {name: on_trunk(head.layer) for name, head in HEADS.items()}
