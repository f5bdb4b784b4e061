"""MiniMax-M2: a sigmoid with a bias (https://huggingface.co/MiniMaxAI/MiniMax-M2, 2025)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count
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


def minimax_m2(config: Config, **options: Any) -> Block:
    """The block of MiniMax-M2."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_local_experts")
    experts = glu_experts(
        d_model,
        count(config, "intermediate_size"),
        num_experts,
        names=MIXTRAL,
        activation=activation(config),
    )
    gate = choosing(router(d_model, num_experts), num_experts, "e_score_correction_bias")
    route = partial(sigmoid_top_k, k=chosen(config, num_experts))
    return mixture(gate, experts, num_experts, route, **options)
