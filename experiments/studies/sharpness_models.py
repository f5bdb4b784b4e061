"""The four heads on a trunk small enough that its Hessian can be studied, for images of digits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax

import moejax
from data import channels_last
from parts.convolutional import convolve_by_slices
from studies.heads import Head, heads

CHANNELS = (1, 8, 16, 32)
FEATURES = 4 * 4 * CHANNELS[-1]


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


def on_trunk(head: Head) -> moejax.Layer:
    """A classifier, ``apply(params, images) -> (logits [N, 10], balance)``."""
    features = trunk()

    def init(key: jax.Array) -> Any:
        trunk_key, head_key = jax.random.split(key)
        return {"trunk": features.init(trunk_key), "head": head.layer.init(head_key)}

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = features.apply(params["trunk"], images)
        logits, decision = head.layer.apply(params["head"], x)
        return logits, head.balance(decision)

    return moejax.Layer(init, apply)


HEADS = heads(FEATURES)
MODELS = {name: on_trunk(head) for name, head in HEADS.items()}
