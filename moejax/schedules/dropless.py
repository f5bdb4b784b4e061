"""The dropless schedule: every choice is computed, at the cost of the choices alone.

Experts compute about the mean load in a batched pass, which is as fast as matrix products get;
with many experts, those with most choices compute more. The choices beyond it go through loops over
blocks of one expert each, with as many trips as there are blocks. Balanced and random routing leave
little to the loops; when collapsed routing would leave most of the batched pass empty, the loops do
everything.
"""

from __future__ import annotations

import math

from moejax._checks import check_problem, takes
from moejax._sorting import sort_by_expert
from moejax.base import Array, Expert, Params, Routing
from moejax.schedules._sorted.batched import ROWS
from moejax.schedules._sorted.gated_sum import Split, gated_sum
from moejax.schedules._sorted.slots import Group


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
    """About the mean load in the batched pass, and loops over large blocks and small ones.

    A block of a loop copies its expert's parameters, which takes as long as computing about 60
    rows, whatever the widths: small blocks waste least on experts that are just over the mean, and
    large ones keep the pace when nearly all choices are left to the loops. With fewer choices than
    experts there is no batched pass: it would read every expert for a few of them. (At 16 tokens
    and 64 experts one row each took 41% less time with backward, and 20% more forward. Gathering
    the chosen experts' parameters for one batched product was no faster than the loop at 2 choices,
    and 4 times slower at 32. Two blocks side by side were 2% faster than one.)
    """
    mean = -(-num_choices // num_experts)
    if num_choices < num_experts:
        return Split((Group(num_experts, 0),), (128, 8))
    block = min(32, max(8, (mean + math.isqrt(mean)) // 2))
    return Split(_groups(mean, num_experts), (16 * block, block))


def _groups(mean: int, num_experts: int) -> tuple[Group, ...]:
    """Rows of the batched pass: most for the quarter of the experts with most choices.

    They are in units of the standard deviation of the load of random routing above its mean. A
    linear router loads its experts more unevenly, so that the first quarter needs much; none has
    less than the mean, which perfect balance needs. At 64 experts of 128 tokens each, 12% more
    rows than choices leave nothing to the loops. One group, with 9% more and some twenty blocks,
    took 6% longer forward and 9% with backward, at 256 experts 17% and 11%. (Four groups were no
    faster. Nor were rows for every chunk chosen from its loads at run time: 10% either way.)

    With few experts the loads differ little. With few rows all experts are computed at once, and
    rows cost little beside reading the parameters: two deviations took 20% less time than one at 64
    tokens and 64 experts, forward and backward, and 16% less at 256 tokens.
    """
    deviation = math.sqrt(mean)
    if num_experts * mean <= ROWS:
        return (Group(num_experts, min(math.ceil(mean + 2 * deviation), ROWS // num_experts)),)
    if num_experts < 16 or num_experts % 4:
        return (Group(num_experts, mean + int(deviation)),)
    most, many, rest = (math.ceil(mean + by * deviation) for by in (3.5, 1.2, 0.2))
    most += -(most + many + 2 * rest) % 4  # so that the mean over all experts is whole
    quarter = num_experts // 4
    return Group(quarter, most), Group(quarter, many), Group(2 * quarter, rest)
