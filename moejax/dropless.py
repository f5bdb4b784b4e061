"""The dropless schedule: every choice is computed, at the cost of the choices alone.

Every expert computes a little over the mean load in a batched pass, which is as fast as matrix
products get. The choices beyond it go through loops over blocks of one expert each, with as many
trips as there are blocks. Balanced routing leaves little to the loops; when collapsed routing
would leave most of the batched pass empty, the loops do everything.
"""

from __future__ import annotations

import math

from moejax.dispatch import sort_by_expert
from moejax.execution import check_problem
from moejax.gated_sum import Split, gated_sum
from moejax.types import Array, Expert, Params, Routing, takes


@takes(Routing)
def dropless(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """Runs every expert on the tokens that chose it, however many, and blends.

    ``y_t = sum_k w_tk E_{e_tk}(x_t)``: equal to `dense` in value and in gradient. Differentiable
    in reverse mode any number of times; forward mode (``jax.jvp``) raises a TypeError. The backward
    pass computes the experts again, and the forward pass keeps nothing of what is inside them.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``, one row at a time: what
            it makes of a token must not depend on the others.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.

    Returns:
        The blend, shape [T, ...], in the dtype of x (of the experts' outputs if x holds integers).

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.top_k(jnp.ones((5, 4)), k=2)
        >>> dropless(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing).shape
        (5, 2)

    References:
        Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022
    """
    params, x = check_problem(params, x, routing.scores.shape)
    choices = sort_by_expert(routing.experts, routing.num_experts)
    split = mean_and_blocks(routing.experts.size, routing.num_experts)
    return gated_sum(expert, params, x, routing.weights, choices, split)


def mean_and_blocks(num_choices: int, num_experts: int) -> Split:
    """A little over the mean load in the batched pass, and loops over large blocks and small ones.

    The batched pass has one standard deviation of the load of random routing above its mean: that
    costs balanced routing 2 to 8%, and saves random routing as much. A block copies its expert's
    parameters, which takes as long as computing about 60 rows, whatever the widths: small blocks
    waste least on experts that are just over the mean, and large ones keep the pace when nearly
    all choices are left to the loops. With fewer choices than experts there is no batched pass: it
    would read every expert for a few of them. (Gathering the chosen experts' parameters for one
    batched product was no faster than the loop at 2 choices, and 4 times slower at 32. Two blocks
    side by side were 2% faster than one. Chunks in the order of their experts' loads, each of a
    size that fits, needed no loops, and were from 10% slower to 10% faster.)
    """
    mean = -(-num_choices // num_experts)
    capacity = 0 if num_choices < num_experts else mean + math.isqrt(mean)
    block = min(32, max(8, capacity // 2))
    return Split(capacity, (16 * block, block))
