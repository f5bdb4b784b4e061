"""DeepSeek-V4: the root of a softplus, a bias that chooses, clamped SwiGLU.

https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-Base. Its first layers choose
experts by a table of token ids; this is the block of the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp

from moejax.base import Array
from moejax.interop.transformers.fields import Config, activation, count, get, one_of
from moejax.interop.transformers.pieces import (
    MIXTRAL,
    QWEN,
    Block,
    beside,
    choosing,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import by_score, root_softplus


def deepseek_v4(config: Config, **options: Any) -> Block:
    """The block of the layers that choose by score."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "moe_intermediate_size")
    num_experts, act = count(config, "n_routed_experts"), activation(config)
    one_of(config, "scoring_func", "sqrtsoftplus")
    one_of(config, "norm_topk_prob", True)
    one_of(config, "n_shared_experts", 1)
    limit = get(config, "swiglu_limit")

    def clamped(gate: Array, up: Array) -> Array:
        return act(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)

    route = partial(
        by_score,
        k=chosen(config, num_experts),
        score=root_softplus,
        scale=get(config, "routed_scaling_factor"),
    )
    experts = glu_experts(d_model, d_hidden, num_experts, names=MIXTRAL, combine=clamped)
    shared = dense_glu(
        d_model,
        d_hidden,
        "shared_experts",
        names=QWEN,
        published_names=MIXTRAL,
        bias=get(config, "mlp_bias"),
        combine=clamped,
    )
    logits = router(d_model, num_experts)
    gate = choosing(logits, num_experts, "gate.e_score_correction_bias", published="gate.bias")
    return beside(mixture(gate, experts, num_experts, route, **options), shared)
