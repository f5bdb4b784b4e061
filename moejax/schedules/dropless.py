"""The dropless schedule: every choice is computed, at the cost of the choices alone.

Each expert computes about the mean load in a batched pass, which is as fast as matrix products get;
with many experts, the ones with the most choices compute more. The remaining choices go through
loops over blocks of one expert each, with as many trips as there are blocks. Balanced and random
routing leave little to the loops; when collapsed routing would leave most of the batched pass
empty, the loops do everything. On accelerators, experts that take ``matmul`` run once over all
choices, with one grouped product for each of their products.
"""

from __future__ import annotations

from moejax._checks import check_problem, takes
from moejax.base import Array, Expert, Params, Routing
from moejax.schedules._sorted.gated_sum import gated_sum
from moejax.schedules._sorted.policy import policy_for_dropless


@takes(Routing)
def dropless(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    r"""Runs every expert on the tokens that chose it, however many, and blends.

    .. math:: y_t = \sum_k w_{tk}\, E_{e_{tk}}(x_t)

    Equal to `dense` in value and in gradient. Differentiable in reverse mode any number of times;
    forward mode (``jax.jvp``) raises a TypeError. The backward pass computes the experts again, so
    the forward pass keeps none of their intermediate values.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]`` that treats each row alone:
            its output for one token must not depend on the others.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.

    Returns:
        The blend, shape [T, ...], in the dtype of x or, if that cannot hold it, in one that can.

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
    num_tokens, k = routing.experts.shape
    policy = policy_for_dropless(expert, num_tokens, routing.num_experts, k)
    return gated_sum(expert, params, x, routing.experts, routing.weights, policy)
