"""Flint: a sigmoid without a bias, beside a shared expert in full (https://huggingface.co/RecursiveSI/flint)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get
from moejax.interop.transformers.pieces import (
    Block,
    beside,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import sigmoid_top_k


def flint(config: Config, **options: Any) -> Block:
    """The block of Flint."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_experts")
    act, renormalize = activation(config), get(config, "norm_topk_prob")
    k = chosen(config, num_experts, renormalize=renormalize)
    route = partial(sigmoid_top_k, k=k, renormalize=renormalize)
    experts = glu_experts(
        d_model, count(config, "moe_intermediate_size"), num_experts, activation=act
    )
    shared = dense_glu(
        d_model,
        count(config, "shared_expert_intermediate_size"),
        "shared_expert",
        activation=act,
    )
    return beside(
        mixture(router(d_model, num_experts), experts, num_experts, route, **options), shared
    )
