"""Granite: top-k renormalised over the kept logits, shared or not.

Granite 3.0 MoE (https://huggingface.co/ibm-granite/granite-3.0-1b-a400m-base, 2024) and Granite 4.0
(https://huggingface.co/ibm-granite/granite-4.0-tiny-preview, 2025), whose shared layer is a module
of its own beside the mixture, so the names of its block begin one module higher up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.torch import Layout, Tensor, at, parts, stacked
from moejax.interop.transformers.fields import Config, activation, count
from moejax.interop.transformers.pieces import Block, beside, chosen, mixture, router
from moejax.layers import glu
from moejax.rules import top_k


def granitemoe(config: Config, **options: Any) -> Block:
    """The block of Granite 3.0 MoE."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_local_experts")
    d_hidden = count(config, "intermediate_size")
    layer = glu(d_model, d_hidden, activation=activation(config))
    two = partial(_two, d_model, d_hidden)
    experts = Block(
        layer,
        stacked(two("experts.gate_up_proj", "experts.down_proj"), num_experts),
        stacked(two("input_linear.weight", "output_linear.weight"), num_experts),
    )
    gate = router(d_model, num_experts, "router", published="router.layer")
    route = partial(top_k, k=chosen(config, num_experts))
    return mixture(gate, experts, num_experts, route, **options)


def granitemoeshared(config: Config, **options: Any) -> Block:
    """The block of Granite 4.0, with its shared layer."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "shared_intermediate_size")
    layout = at(
        "shared_mlp", _two(d_model, d_hidden, "input_linear.weight", "output_linear.weight")
    )
    shared = Block(glu(d_model, d_hidden, activation=activation(config)), layout, layout)
    layer, *layouts = granitemoe(config, **options)
    routed = Block(layer, *(at("block_sparse_moe", one) for one in layouts))
    return beside(routed, shared)


def _two(d_model: int, d_hidden: int, gate_up: str, down: str) -> Layout:
    gate, up = parts(Tensor(gate_up, (2 * d_hidden, d_model), (1, 0)), 2)
    down_tensor = Tensor(down, (d_model, d_hidden), (1, 0))
    return {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down_tensor}}
