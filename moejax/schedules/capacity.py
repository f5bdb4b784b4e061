"""The capacity schedule: a fixed number of slots per expert, and what does not fit is dropped."""

from __future__ import annotations

from moejax._checks import check_problem, takes
from moejax.base import Array, Expert, Params, Routing
from moejax.rules import capacity_for
from moejax.schedules._sorted.gated_sum import gated_sum
from moejax.schedules._sorted.policy import policy_for_capacity


@takes(Routing)
def capacity(expert: Expert, params: Params, x: Array, routing: Routing, *, factor: float) -> Array:
    r"""Gives every expert the same number of slots, and drops the choices that find none.

    Each expert has C slots,

    .. math:: C = \lceil \text{factor} \cdot T K / E \rceil

    All first choices are placed before any second choice, and earlier tokens before later ones;
    choices of weight zero, which add nothing, are placed last. So for K >= 2 a later token can
    take the slot of an earlier token's second choice, and C itself counts all tokens: in a causal
    decoder, use `limit_capacity` with the priority `by_token` instead.

    A dropped choice contributes nothing, and the token's other choices keep their weights. With
    ``factor >= E / K`` nothing is ever dropped. For `relu`, and for `top_p` without ``k``, K = E:
    pass `limit_capacity` a number, or `top_p` a ``k``.

    Differentiable in reverse mode any number of times; forward mode (``jax.jvp``) raises a
    TypeError.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.
        factor: slots per expert in units of the mean load, positive.

    Returns:
        The blend, shape [T, ...], in the dtype of x or, if that cannot hold it, in one that can.

    Raises:
        ValueError: if ``factor`` is not a positive finite number, or if an expert does not return
            one output per token.

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.top_k(jnp.ones((5, 4)), k=2)
        >>> capacity(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing, factor=1.0).shape
        (5, 2)

    References:
        Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020;
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    slots = capacity_for(routing, factor=factor)
    params, x = check_problem(params, x, routing.scores.shape)
    policy = policy_for_capacity(routing.num_experts, slots)
    return gated_sum(expert, params, x, routing.experts, routing.weights, policy)
