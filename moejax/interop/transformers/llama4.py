"""Llama 4: the gate, a sigmoid, multiplies the expert's input; beside a shared expert.

https://ai.meta.com/blog/llama-4-multimodal-intelligence/, 2025.
"""

from __future__ import annotations

from functools import partial

from moejax.base import Schedule
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
from moejax.rules import sigmoid_top_k
from moejax.schedules.dropless import dropless
from moejax.schedules.scale_inputs import scale_inputs


def llama4_text(config: Config, execute: Schedule | None = None) -> Block:
    """The block of Llama 4."""
    d_model, d_hidden = count(config, "hidden_size"), count(config, "intermediate_size")
    num_experts, act = count(config, "num_local_experts"), activation(config)
    experts = glu_experts(
        d_model, d_hidden, num_experts, names=None, transposed=True, activation=act
    )
    k = chosen(config, num_experts, renormalize=False)
    routed = mixture(
        router(d_model, num_experts, "router"),
        experts,
        num_experts,
        partial(sigmoid_top_k, k=k, renormalize=False),
        execute=scale_inputs(execute or dropless),
    )
    return beside(routed, dense_glu(d_model, d_hidden, "shared_expert", activation=act))
