"""Hunyuan: top-k renormalised beside a shared expert (https://arxiv.org/abs/2411.02265, 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count
from moejax.interop.transformers.pieces import (
    Block,
    beside,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import top_k


def hunyuan_v1_moe(config: Config, **options: Any) -> Block:
    """The block of Hunyuan, where all layers are alike."""
    config = _one_for_all(config, "num_experts", "moe_topk")
    d_model, d_hidden = count(config, "hidden_size"), count(config, "intermediate_size")
    num_experts, act = count(config, "num_experts"), activation(config)
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    route = partial(top_k, k=chosen(config, num_experts, "moe_topk"))
    routed = mixture(
        router(d_model, num_experts, "gate.wg"), experts, num_experts, route, **options
    )
    return beside(routed, dense_glu(d_model, d_hidden, "shared_mlp", activation=act))


def _one_for_all(config: Config, *names: str) -> Config:
    """The configuration with one number in place of a list of equal numbers, one per layer."""
    lists = {name: config[name] for name in names if isinstance(config.get(name), list)}
    return {**config, **{name: one[0] for name, one in lists.items() if one == one[:1] * len(one)}}
