"""OLMoE: top-k, usually with the raw probabilities.

OLMoE (https://arxiv.org/abs/2409.02060, 2024), FlexOlmo (https://arxiv.org/abs/2507.07024,
2025).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get
from moejax.interop.transformers.pieces import Block, chosen, glu_experts, mixture, router
from moejax.rules import top_k


def olmoe(config: Config, **options: Any) -> Block:
    """The block of OLMoE; FlexOlmo has the same."""
    d_model = count(config, "hidden_size")
    num_experts = count(config, "num_experts", "num_local_experts")
    experts = glu_experts(
        d_model, count(config, "intermediate_size"), num_experts, activation=activation(config)
    )
    renormalize = get(config, "norm_topk_prob")
    k = chosen(config, num_experts, renormalize=renormalize)
    route = partial(top_k, k=k, renormalize=renormalize)
    return mixture(router(d_model, num_experts), experts, num_experts, route, **options)
