"""Laguna: a sigmoid with a bias, logits capped, beside a shared expert.

https://huggingface.co/poolside/laguna-XS.2
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get, one_of
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
from moejax.routers import soft_capped
from moejax.rules import sigmoid_top_k


def laguna(config: Config, **options: Any) -> Block:
    """The block of Laguna."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_experts")
    one_of(config, "moe_apply_router_weight_on_input", False)
    act, cap = activation(config), get(config, "moe_router_logit_softcapping")
    logits = router(d_model, num_experts)
    if cap > 0:
        logits = logits._replace(layer=soft_capped(logits.layer, cap=cap))
    gate = choosing(
        logits,
        num_experts,
        "gate.e_score_correction_bias",
        published="experts.e_score_correction_bias",
    )
    route = partial(
        sigmoid_top_k,
        k=chosen(config, num_experts),
        scale=get(config, "moe_routed_scaling_factor"),
    )
    experts = glu_experts(
        d_model, count(config, "moe_intermediate_size"), num_experts, activation=act
    )
    shared = dense_glu(
        d_model,
        count(config, "shared_expert_intermediate_size"),
        "shared_experts",
        published="shared_expert",
        activation=act,
    )
    return beside(mixture(gate, experts, num_experts, route, **options), shared)
