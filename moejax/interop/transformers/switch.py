"""Switch: one expert per token, capacity per sequence (https://arxiv.org/abs/2101.03961, 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Array, Expert, Layer, Params, Routing, Schedule
from moejax.interop.torch import Layout, Tensor, at
from moejax.interop.torch import linear as linear_layout
from moejax.interop.torch import stack as spread
from moejax.interop.transformers.fields import Config, activation, count, get, one_of
from moejax.interop.transformers.pieces import Block, mixture, router
from moejax.layers import linear, mlp
from moejax.rules import limit_capacity, switch
from moejax.schedules.dropless import dropless


def switch_transformers(config: Config, *, execute: Schedule | None = None) -> Block:
    """The block of Switch; x is [sequences, tokens, D], and the decision keeps its first axis."""
    d_model, d_hidden = count(config, "d_model"), count(config, "d_ff")
    num_experts, slots = count(config, "num_experts"), count(config, "expert_capacity")
    one_of(config, "router_dtype", "float32")
    layer = mlp(
        d_model,
        d_hidden,
        d_model,
        activation=activation(config, "dense_act_fn"),
        layer=partial(linear, bias=False),
    )
    layout = _experts(d_model, d_hidden, num_experts)
    gate = router(d_model, num_experts, "router.classifier", bias=get(config, "router_bias"))

    schedule = execute or dropless

    def limited(expert: Expert, params: Params, x: Array, decision: Routing) -> Array:
        return schedule(expert, params, x, limit_capacity(decision, capacity=slots))

    block = mixture(gate, Block(layer, layout, layout), num_experts, switch, execute=limited)
    return block._replace(layer=_by_sequence(block.layer))


def _by_sequence(layer: Layer) -> Layer:
    def one(params: Params, x: Array, key: Array | None, mask: Array | None) -> Any:
        return layer.apply(params, x, key=key, mask=mask)

    def apply(
        params: Params, x: Array, *, key: Array | None = None, mask: Array | None = None
    ) -> Any:
        x = jnp.asarray(x)
        if x.ndim != 3:
            raise ValueError(
                f"`x` must be [sequences, tokens, D], got {list(x.shape)}: the capacity is that of "
                "one sequence, so reshape x."
            )
        keys = None if key is None else jax.random.split(key, len(x))
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(params, x, keys, mask)

    return Layer(layer.init, apply)


def _experts(d_model: int, d_hidden: int, num_experts: int) -> Layout:
    layers = [
        at("wi", linear_layout(d_model, d_hidden, bias=False)),
        at("wo", linear_layout(d_hidden, d_model, bias=False)),
    ]

    def renamed(tensor: Tensor) -> Tensor:
        return Tensor(f"experts.expert_{tensor.key}", tensor.shape, tensor.axes, tensor.counts)

    return jax.tree.map(renamed, spread({"layers": layers}, num_experts))
