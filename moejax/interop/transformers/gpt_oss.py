"""GPT-OSS: top-k, biases everywhere, clamped SwiGLU, gate and up interleaved.

https://arxiv.org/abs/2508.10925, 2025.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Array
from moejax.interop.torch import Layout, Tensor, at, parts, stacked
from moejax.interop.transformers.fields import Config, count, optional
from moejax.interop.transformers.pieces import Block, chosen, mixture, router
from moejax.layers import glu, linear
from moejax.rules import top_k


def gpt_oss(config: Config, **options: Any) -> Block:
    """The block of GPT-OSS."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "intermediate_size")
    num_experts = count(config, "num_local_experts")
    # Published configurations do not have the slope, which is fixed in the model's own code.
    slope, limit = optional(config, "swiglu_alpha", 1.702), optional(config, "swiglu_limit", 7.0)

    def clamped(gate: Array, up: Array) -> Array:
        gate = jnp.minimum(gate, limit)
        return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(slope * gate)

    layout = at("experts", stacked(_one(d_model, d_hidden), num_experts))
    experts = Block(glu(d_model, d_hidden, combine=clamped, layer=linear), layout, layout)
    route = partial(top_k, k=chosen(config, num_experts))
    gate = router(d_model, num_experts, "router", bias=True)
    return mixture(gate, experts, num_experts, route, **options)


def _one(d_model: int, d_hidden: int) -> Layout:
    """One expert: kernels [D, 2F] and [F, D], as in the layer."""
    whole = Tensor("gate_up_proj", (d_model, 2 * d_hidden), (0, 1))
    biases = Tensor("gate_up_proj_bias", (2 * d_hidden,), (0,))
    gate, up = parts(whole, 2, axis=1, interleaved=True)
    gate_bias, up_bias = parts(biases, 2, interleaved=True)
    return {
        "gate": {"kernel": gate, "bias": gate_bias},
        "up": {"kernel": up, "bias": up_bias},
        "down": {
            "kernel": Tensor("down_proj", (d_hidden, d_model), (0, 1)),
            "bias": Tensor("down_proj_bias", (d_model,), (0,)),
        },
    }
