"""Aria: top-k renormalised beside shared experts (https://arxiv.org/abs/2410.05993, 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.torch import Tensor, at, parts, stacked
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
from moejax.rules import top_k


def aria_text(config: Config, **options: Any) -> Block:
    """The block of Aria; its routed experts have a SiLU whatever the configuration says."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "intermediate_size")
    num_experts = count(config, "moe_num_experts")
    experts = glu_experts(d_model, d_hidden, num_experts, names=None, transposed=True)
    gate, up = parts(Tensor("fc1.weight", (d_model, 2 * d_hidden), (0, 1)), 2, axis=1)
    down = Tensor("fc2.weight", (d_hidden, d_model), (0, 1))
    one = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down}}
    experts = experts._replace(published=at("experts", stacked(one, num_experts)))
    route = partial(top_k, k=chosen(config, num_experts, "moe_topk"))
    shared = dense_glu(
        d_model,
        d_hidden * count(config, "moe_num_shared_experts"),
        "shared_experts",
        bias=get(config, "mlp_bias"),
        activation=activation(config),
    )
    routed = mixture(router(d_model, num_experts, "router"), experts, num_experts, route, **options)
    return beside(routed, shared)
