"""Qwen: top-k, and a shared expert behind a gate of its own in every other generation.

Qwen2-MoE (https://arxiv.org/abs/2407.10671, 2024), Qwen3-MoE (https://arxiv.org/abs/2505.09388,
2025), Qwen3-VL (https://arxiv.org/abs/2511.21631, 2025), Qwen3-Next
(https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct, 2025) and Qwen3.5
(https://huggingface.co/Qwen/Qwen3.5-35B-A3B, 2026); Mellum has the block of Qwen3-MoE
(https://huggingface.co/JetBrains/Mellum2-12B-A2.5B-Base).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.transformers.fields import Config, activation, count, get
from moejax.interop.transformers.pieces import (
    Block,
    behind,
    beside,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import top_k


def qwen3_moe(config: Config, **options: Any) -> Block:
    """Top-k, renormalised where `norm_topk_prob` says so; Mellum has the same block."""
    return _routed(config, renormalize=get(config, "norm_topk_prob"), **options)


def qwen3_vl_moe(config: Config, **options: Any) -> Block:
    """Top-k renormalised; checkpoints have all experts in two tensors, transposed."""
    block = _routed(config, renormalize=True, **options)
    in_two = glu_experts(
        count(config, "hidden_size"),
        count(config, "moe_intermediate_size"),
        count(config, "num_experts", "num_local_experts"),
        transposed=True,
    )
    return block._replace(published={**block.published, "experts": in_two.layout})


def qwen2_moe(config: Config, **options: Any) -> Block:
    """As `qwen3_moe`, beside a shared expert behind its gate; Qwen3-Next has the same block."""
    return beside(qwen3_moe(config, **options), _shared(config))


def qwen3_5_moe(config: Config, **options: Any) -> Block:
    """Top-k renormalised, beside a shared expert behind its gate."""
    return beside(_routed(config, renormalize=True, **options), _shared(config))


def _routed(config: Config, *, renormalize: bool, **options: Any) -> Block:
    d_model = count(config, "hidden_size")
    num_experts = count(config, "num_experts", "num_local_experts")
    experts = glu_experts(
        d_model,
        count(config, "moe_intermediate_size"),
        num_experts,
        activation=activation(config),
    )
    k = chosen(config, num_experts, renormalize=renormalize)
    route = partial(top_k, k=k, renormalize=renormalize)
    return mixture(router(d_model, num_experts), experts, num_experts, route, **options)


def _shared(config: Config) -> Block:
    d_model = count(config, "hidden_size")
    d_hidden = count(config, "shared_expert_intermediate_size")
    shared = dense_glu(d_model, d_hidden, "shared_expert", activation=activation(config))
    return behind(shared, router(d_model, 1, "shared_expert_gate"))
