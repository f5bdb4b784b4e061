"""ERNIE 4.5: chosen by p + b, weighted by p (huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get, refuse
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
from moejax.rules import by_score


def ernie4_5_moe(config: Config, **options: Any) -> Block:
    """The block of ERNIE 4.5."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "moe_intermediate_size")
    num_experts, act = count(config, "moe_num_experts"), activation(config)
    smallest = get(config, "moe_norm_min")
    if smallest > 1e-9:  # the least sum to divide by; no sum of the best k is near it
        refuse(config, "moe_norm_min", "be at most 1e-9", smallest)
    gate = choosing(
        router(d_model, num_experts),
        num_experts,
        "gate.moe_statics.e_score_correction_bias",
        published="moe_statics.e_score_correction_bias",
        stored=(1, num_experts),
    )
    route = partial(by_score, k=chosen(config, num_experts, "moe_k"))
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    routed = mixture(gate, experts, num_experts, route, **options)
    num_shared = get(config, "moe_num_shared_experts")
    if not num_shared:
        return routed
    shared = dense_glu(
        d_model,
        d_hidden * num_shared,
        "shared_experts",
        bias=get(config, "use_bias"),
        activation=act,
    )
    return beside(routed, shared)
