"""Rules: pure functions ``logits -> decision`` that say which token goes to which expert.

A rule has no parameters. Its arithmetic is in float32 at the least, whatever the router returns.
Ties go to the lower index. Without a key nothing is random.
"""

from moejax.routing.balanced import sigmoid_top_k, sinkhorn, update_balance_bias
from moejax.routing.basic import mask_tokens, softmax, switch, top_k
from moejax.routing.capacity import (
    by_choice,
    by_token_weight,
    by_weight,
    capacity_for,
    limit_capacity,
    positions,
)
from moejax.routing.hashed import hashed
from moejax.routing.noisy import gshard_top_2, noisy_top_k
from moejax.routing.relu import relu, update_l1_coefficient
from moejax.routing.slots import expert_choice, soft_slots

__all__ = [
    "by_choice",
    "by_token_weight",
    "by_weight",
    "capacity_for",
    "expert_choice",
    "gshard_top_2",
    "hashed",
    "limit_capacity",
    "mask_tokens",
    "noisy_top_k",
    "positions",
    "relu",
    "sigmoid_top_k",
    "sinkhorn",
    "soft_slots",
    "softmax",
    "switch",
    "top_k",
    "update_balance_bias",
    "update_l1_coefficient",
]
