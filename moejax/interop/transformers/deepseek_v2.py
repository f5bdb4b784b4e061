"""DeepSeek-V2: a softmax, groups by their best expert (https://arxiv.org/abs/2405.04434, 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any

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
from moejax.rules import by_score


def deepseek_v2(config: Config, **options: Any) -> Block:
    """The block of DeepSeek-V2, with either of its two routing methods."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "moe_intermediate_size")
    num_experts, act = count(config, "n_routed_experts"), activation(config)
    one_of(config, "norm_topk_prob", False, None)  # the installed module does not read it
    groups: dict[str, Any] = {}
    if one_of(config, "topk_method", "greedy", "group_limited_greedy") != "greedy":
        groups = {
            "num_groups": count(config, "n_group"),
            "kept_groups": count(config, "topk_group"),
            "group_best": 1,
        }
    route = partial(
        by_score,
        k=chosen(config, num_experts, renormalize=False),
        renormalize=False,
        scale=get(config, "routed_scaling_factor"),
        **groups,
    )
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    shared = dense_glu(
        d_model,
        d_hidden * count(config, "n_shared_experts"),
        "shared_experts",
        bias=get(config, "mlp_bias"),
        activation=act,
    )
    return beside(
        mixture(router(d_model, num_experts), experts, num_experts, route, **options), shared
    )
