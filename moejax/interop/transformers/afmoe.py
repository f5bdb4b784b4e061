"""AFMoE: a sigmoid with a bias beside shared experts (https://huggingface.co/arcee-ai/Trinity-Mini)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get
from moejax.interop.transformers.pieces import (
    Block,
    beside,
    choosing,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import sigmoid_top_k


def afmoe(config: Config, **options: Any) -> Block:
    """The block of AFMoE."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "moe_intermediate_size")
    num_experts, act = count(config, "num_experts"), activation(config)
    gate = choosing(router(d_model, num_experts, "router.gate"), num_experts, "expert_bias")
    route = partial(sigmoid_top_k, k=chosen(config, num_experts), scale=get(config, "route_scale"))
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    num_shared = count(config, "num_shared_experts")
    shared = dense_glu(d_model, d_hidden * num_shared, "shared_experts", activation=act)
    return beside(mixture(gate, experts, num_experts, route, **options), shared)
