"""LFM2-MoE: a sigmoid, a bias, a sum plus 1e-6 (https://arxiv.org/abs/2511.23404, 2025)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.base import Array, Routing
from moejax.interop.transformers.fields import Config, count, get
from moejax.interop.transformers.pieces import (
    MIXTRAL,
    Block,
    choosing,
    chosen,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import sigmoid_top_k


def lfm2_moe(config: Config, **options: Any) -> Block:
    """The block of LFM2-MoE."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_experts")
    experts = glu_experts(
        d_model, count(config, "moe_intermediate_size"), num_experts, names=MIXTRAL
    )
    gate = router(d_model, num_experts)
    if get(config, "use_expert_bias"):
        gate = choosing(gate, num_experts, "expert_bias")
    route = partial(
        _almost_renormalized if get(config, "norm_topk_prob") else _raw,
        k=chosen(config, num_experts, renormalize=False),
        scale=get(config, "routed_scaling_factor"),
    )
    return mixture(gate, experts, num_experts, route, **options)


def _raw(logits: Array, bias: Array | None = None, *, k: int, scale: float) -> Routing:
    return sigmoid_top_k(logits, bias, k=k, renormalize=False, scale=scale)


def _almost_renormalized(
    logits: Array, bias: Array | None = None, *, k: int, scale: float
) -> Routing:
    decision = sigmoid_top_k(logits, bias, k=k, renormalize=False)
    total = decision.weights.sum(axis=-1, keepdims=True) + 1e-6
    return decision._replace(weights=scale * decision.weights / total)
