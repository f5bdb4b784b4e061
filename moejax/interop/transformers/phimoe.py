"""Phi-3.5-MoE: sparsemixer (https://arxiv.org/abs/2409.12136, 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get, one_of, refuse
from moejax.interop.transformers.pieces import MIXTRAL, Block, glu_experts, mixture, router
from moejax.rules import sparsemixer


def phimoe(config: Config, **options: Any) -> Block:
    """The block of Phi-3.5-MoE; given a key, it draws experts as in training."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_local_experts")
    one_of(config, "num_experts_per_tok", 2)
    epsilon = get(config, "router_jitter_noise")
    if not epsilon > 0:
        refuse(config, "router_jitter_noise", "be positive", epsilon)
    experts = glu_experts(
        d_model,
        count(config, "intermediate_size"),
        num_experts,
        names=MIXTRAL,
        activation=activation(config),
    )
    gate = router(d_model, num_experts, "router", published="gate")
    return mixture(gate, experts, num_experts, partial(sparsemixer, epsilon=epsilon), **options)
