"""DBRX: top-k, divided by the sum, and all experts on top of each other in three matrices.

https://huggingface.co/databricks/dbrx-base, 2024.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moejax.interop.torch import Tensor
from moejax.interop.transformers.fields import Config, activation, as_dict, count, get, one_of
from moejax.interop.transformers.pieces import Block, chosen, mixture, router
from moejax.layers import glu
from moejax.rules import top_k


def dbrx(config: Config, **options: Any) -> Block:
    """The block of DBRX."""
    d_model = count(config, "d_model")
    ffn = as_dict(get(config, "ffn_config"))
    num_experts, d_hidden = count(ffn, "moe_num_experts"), count(ffn, "ffn_hidden_size")
    # The 1-norm of positive numbers is their sum; None leaves them as they are.
    renormalize = one_of(ffn, "moe_normalize_expert_weights", 1, None) is not None
    whole = partial(
        Tensor, shape=(num_experts, d_hidden, d_model), stored=(num_experts * d_hidden, d_model)
    )
    layout = {
        "gate": {"kernel": whole("experts.mlp.w1", axes=(0, 2, 1))},
        "up": {"kernel": whole("experts.mlp.v1", axes=(0, 2, 1))},
        "down": {"kernel": whole("experts.mlp.w2", axes=(0, 1, 2))},
    }
    act = activation(get(ffn, "ffn_act_fn") or {"name": "silu"}, "name")
    experts = Block(glu(d_model, d_hidden, activation=act), layout, layout)
    k = chosen(ffn, num_experts, "moe_top_k", renormalize=renormalize)
    route = partial(top_k, k=k, renormalize=renormalize)
    return mixture(
        router(d_model, num_experts, "router.layer"), experts, num_experts, route, **options
    )
