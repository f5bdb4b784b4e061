"""Mixtral: top-k renormalised, SwiGLU (Jiang et al., https://arxiv.org/abs/2401.04088, 2024).

MiniMax-01 (https://arxiv.org/abs/2501.08313, 2025) has the same block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count
from moejax.interop.transformers.pieces import MIXTRAL, Block, chosen, glu_experts, mixture, router
from moejax.rules import top_k


def mixtral(config: Config, **options: Any) -> Block:
    """The block of Mixtral."""
    d_model, num_experts = count(config, "hidden_size"), count(config, "num_local_experts")
    experts = glu_experts(
        d_model,
        count(config, "intermediate_size"),
        num_experts,
        names=MIXTRAL,
        activation=activation(config),
    )
    route = partial(top_k, k=chosen(config, num_experts))
    return mixture(router(d_model, num_experts), experts, num_experts, route, **options)
