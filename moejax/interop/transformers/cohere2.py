"""Cohere2-MoE: a softmax or a sigmoid over the chosen, shared experts in full or none.

https://huggingface.co/CohereLabs/command-a-plus-05-2026
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moejax.base import Routing
from moejax.interop.transformers.fields import Config, activation, count, get, one_of
from moejax.interop.transformers.pieces import (
    Block,
    beside,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import sigmoid_top_k, top_k


def cohere2_moe(config: Config, **options: Any) -> Block:
    """The block of Cohere2-MoE, whose shared experts are added in full."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "intermediate_size")
    num_experts, act = count(config, "num_experts"), activation(config)
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    gate = router(d_model, num_experts)
    routed = mixture(gate, experts, num_experts, _route(config, num_experts), **options)
    num_shared = get(config, "num_shared_experts")
    if not num_shared:
        return routed
    one_of(config, "shared_expert_combination_strategy", "sum")
    return beside(
        routed, dense_glu(d_model, d_hidden * num_shared, "shared_experts", activation=act)
    )


def _route(config: Config, num_experts: int) -> Callable[..., Routing]:
    if one_of(config, "expert_selection_fn", "softmax", "sigmoid") == "softmax":
        return partial(top_k, k=chosen(config, num_experts))
    renormalize = get(config, "norm_topk_prob")
    k = chosen(config, num_experts, renormalize=renormalize)
    return partial(sigmoid_top_k, k=k, renormalize=renormalize)
