"""DeepSeek-V3: a sigmoid, a bias that chooses, groups by their two best experts, a shared expert.

DeepSeek-V3 (https://arxiv.org/abs/2412.19437, 2024). The same block is in GLM-4.5
(https://arxiv.org/abs/2508.06471, 2025), dots.llm1 (https://arxiv.org/abs/2506.05767, 2025),
K-EXAONE (https://huggingface.co/LGAI-EXAONE/K-EXAONE-236B-A23B), Solar Open
(https://huggingface.co/upstage/Solar-Open-100B) and, with a softmax and no bias, Mistral Small 4
(https://huggingface.co/mistralai/Mistral-Small-4-119B-2603).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moejax.base import Routing
from moejax.interop.transformers.fields import Config, activation, count, get, refuse
from moejax.interop.transformers.pieces import (
    Block,
    beside,
    choosing,
    chosen,
    dense_glu,
    glu_experts,
    mixture,
    router,
)
from moejax.rules import by_score, sigmoid_top_k

BIAS = "gate.e_score_correction_bias"


def deepseek_v3(config: Config, *, published_bias: str = BIAS, **options: Any) -> Block:
    """The block of DeepSeek-V3."""
    num_experts = _num_experts(config)
    logits = router(count(config, "hidden_size"), num_experts)
    gate = choosing(logits, num_experts, BIAS, published=published_bias)
    return _with_gate(config, gate, sigmoid_top_k, **options)


def exaone_moe(config: Config, **options: Any) -> Block:
    """The block of K-EXAONE, whose checkpoints keep the bias elsewhere."""
    return deepseek_v3(config, published_bias="e_score_correction_bias", **options)


def mistral4(config: Config, **options: Any) -> Block:
    """The block of Mistral Small 4: a softmax, and no bias."""
    gate = router(count(config, "hidden_size"), _num_experts(config))
    return _with_gate(config, gate, by_score, **options)


def _num_experts(config: Config) -> int:
    return count(config, "n_routed_experts", "num_experts", "num_local_experts")


def _with_gate(config: Config, gate: Block, rule: Callable[..., Routing], **options: Any) -> Block:
    d_model, d_hidden = count(config, "hidden_size"), count(config, "moe_intermediate_size")
    num_experts, act = _num_experts(config), activation(config)
    renormalize = get(config, "norm_topk_prob")
    route = partial(
        rule,
        k=chosen(config, num_experts, renormalize=renormalize),
        renormalize=renormalize,
        scale=get(config, "routed_scaling_factor"),
        **_groups(config, num_experts),
    )
    experts = glu_experts(d_model, d_hidden, num_experts, activation=act)
    num_shared = count(config, "n_shared_experts", "num_shared_experts")
    shared = dense_glu(d_model, d_hidden * num_shared, "shared_experts", activation=act)
    return beside(mixture(gate, experts, num_experts, route, **options), shared)


def _groups(config: Config, num_experts: int) -> dict[str, Any]:
    num_groups, kept = count(config, "n_group"), count(config, "topk_group")
    if num_experts % num_groups or num_experts < 2 * num_groups:
        refuse(
            config,
            "n_group",
            f"divide {num_experts} experts into groups of two or more",
            num_groups,
        )
    return {"num_groups": num_groups, "kept_groups": kept}
