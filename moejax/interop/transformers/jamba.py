"""Jamba: top-k with the raw probabilities (https://arxiv.org/abs/2403.19887, 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, refuse
from moejax.interop.transformers.pieces import Block, chosen, glu_experts, mixture, router
from moejax.rules import top_k


def jamba(config: Config, **options: Any) -> Block:
    """The block of Jamba."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_experts")
    if num_experts == 1:
        refuse(config, "num_experts", "be at least 2: one expert is a dense layer", num_experts)
    experts = glu_experts(
        d_model, count(config, "intermediate_size"), num_experts, activation=activation(config)
    )
    k = chosen(config, num_experts, renormalize=False)
    route = partial(top_k, k=k, renormalize=False)
    return mixture(router(d_model, num_experts, "router"), experts, num_experts, route, **options)
