"""Rules: pure functions ``logits -> decision`` that say which token goes to which expert.

A rule has no parameters. Its arithmetic is in float32 or wider, whatever the router returns.
Ties go to the lower index. Without a key nothing is random.
"""

from moejax.rules.balanced import sigmoid_top_k, sinkhorn, update_balance_bias
from moejax.rules.by_score import by_score, root_softplus
from moejax.rules.hashed import hashed
from moejax.rules.limit import (
    by_choice,
    by_token,
    by_token_weight,
    by_weight,
    capacity_for,
    limit_capacity,
    mask_tokens,
    positions,
)
from moejax.rules.noisy import gshard_top_2, noisy_top_k
from moejax.rules.relu import relu, update_l1_coefficient
from moejax.rules.slots import expert_choice, soft_slots
from moejax.rules.softmax import softmax, switch, top_k
from moejax.rules.sparsemixer import sparsemixer
from moejax.rules.top_p import top_p

__all__ = [
    "by_choice",
    "by_score",
    "by_token",
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
    "root_softplus",
    "sigmoid_top_k",
    "sinkhorn",
    "soft_slots",
    "softmax",
    "sparsemixer",
    "switch",
    "top_k",
    "top_p",
    "update_balance_bias",
    "update_l1_coefficient",
]
