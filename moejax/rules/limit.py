"""Capacity: who is served when more tokens choose an expert than it has slots.

A *priority* is a function ``routing -> order``: the choices (t, k), numbered ``t K + k``, in the
order in which they are served.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from moejax._checks import check_mask, check_num_choices, is_integer, takes
from moejax._sorting import places_in_queue
from moejax.base import Array, Routing

Priority = Callable[[Routing], Array]


@takes(Routing)
def by_token(routing: Routing) -> Array:
    """The choices in the order of tokens, and within a token in its order of preference.

    Whether a choice is served depends on earlier tokens alone, so it is causal, which no other
    priority is for K >= 2.

    Args:
        routing: a decision of T tokens with K choices each.

    Returns:
        The choices in the order in which they are served, integers [T K].

    Example:
        >>> by_token(moejax.top_k(jnp.ones((3, 4)), k=2))
        Array([0, 1, 2, 3, 4, 5], dtype=int32)
    """
    check_num_choices(routing.experts.size)
    return jnp.arange(routing.experts.size, dtype=jnp.int32)


@takes(Routing)
def by_choice(routing: Routing) -> Array:
    """All first choices before any second choice, then in the order of tokens.

    For K >= 2 a later token's first choice can take the slot of an earlier token's second, so in
    a causal decoder it leaks the future; `by_token` does not.

    Args:
        routing: a decision of T tokens with K choices each.

    Returns:
        The choices in the order in which they are served, integers [T K].

    Example:
        >>> by_choice(moejax.top_k(jnp.ones((3, 4)), k=2))
        Array([0, 2, 4, 1, 3, 5], dtype=int32)

    References:
        Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020
    """
    num_tokens, k = routing.experts.shape
    return _choice_major(jnp.arange(num_tokens, dtype=jnp.int32), k)


@takes(Routing)
def by_token_weight(routing: Routing) -> Array:
    """As `by_choice`, but tokens with a larger top weight first: batch-prioritised routing.

    It depends on all tokens of the call, so in a causal decoder it leaks the future.

    Args:
        routing: a decision of T tokens with K choices each.

    Returns:
        The choices in the order in which they are served, integers [T K].

    Example:
        >>> logits = jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        >>> by_token_weight(moejax.switch(logits))
        Array([1, 2, 0], dtype=int32)

    References:
        Riquelme et al., `Scaling Vision with Sparse Mixture of Experts
        <https://arxiv.org/abs/2106.05974>`_, 2021
    """
    tokens = jnp.argsort(-routing.weights.max(axis=-1), stable=True).astype(jnp.int32)
    return _choice_major(tokens, routing.experts.shape[1])


@takes(Routing)
def by_weight(routing: Routing) -> Array:
    """The choices with the largest weights first, ties as in `by_choice`.

    It depends on all tokens of the call, so in a causal decoder it leaks the future.

    Args:
        routing: a decision of T tokens with K choices each.

    Returns:
        The choices in the order in which they are served, integers [T K].

    Example:
        >>> logits = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1]]))
        >>> by_weight(moejax.top_k(logits, k=2))
        Array([2, 0, 1, 3], dtype=int32)
    """
    order = by_choice(routing)
    return order[jnp.argsort(-routing.weights.ravel()[order], stable=True)]


@takes(Routing)
def limit_capacity(routing: Routing, *, capacity: int, priority: Priority = by_choice) -> Routing:
    """Drops the choices for which their expert has no slot left.

    A dropped choice goes nowhere and contributes nothing; the others keep their weight. Whatever
    the priority, a choice of weight zero is served last: `relu` gives one to a token that no expert
    is active for. Every schedule runs the result. Losses must read the decision before this: after
    it, even a full collapse looks balanced. So limit inside the schedule of `moe`, which still
    returns the decision as it was.

    Args:
        routing: a decision of T tokens with K choices each.
        capacity: C, slots per expert, such as ``capacity_for(routing, factor=1.25)``.
        priority: who is served first: `by_choice`, `by_token`, `by_token_weight`, `by_weight`, or
            a function of your own. In a causal decoder use `by_token`: for K >= 2 every other
            priority lets later tokens decide who is dropped.

    Returns:
        The decision with at most C choices per expert; `share_dropped` compares the two.

    Raises:
        ValueError: if ``capacity`` is not a positive integer.

    Example:
        >>> routing = moejax.switch(jnp.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]))
        >>> limit_capacity(routing, capacity=1).experts.ravel()
        Array([0, 2, 1], dtype=int32)
        >>> def execute(expert, params, x, routing):
        ...     routing = limit_capacity(routing, capacity=2)
        ...     return moejax.dropless(expert, params, x, routing)
    """
    if not (is_integer(capacity) and capacity >= 1):
        raise ValueError(
            f"`capacity` must be an integer, at least 1 slot per expert, got {capacity}: "
            "`capacity_for` makes one of a factor."
        )
    served = positions(routing, priority=priority) < capacity
    experts = jnp.where(served, routing.experts, routing.num_experts)
    weights = jnp.where(served, routing.weights, 0)
    # Not `_replace`: with choices dropped, a `DenseRouting` is no longer one.
    return Routing(experts, weights, *routing[2:])


@takes(Routing)
def capacity_for(routing: Routing, *, factor: float) -> int:
    r"""Slots per expert for a multiple of the mean load.

    .. math:: C = \lceil \text{factor} \cdot T K / E \rceil

    C grows with the number of tokens, later ones included: a causal decoder that must drop the
    same choices whatever follows needs a fixed C. For `relu`, and for `top_p` without ``k``, K = E,
    so a factor of 1 has room for every token: pass `limit_capacity` a number, or `top_p` a ``k``.

    Args:
        routing: a decision; only its shapes are read, so C is a number under ``jax.jit``.
        factor: 1 is room for exactly the balanced load.

    Returns:
        C, at least 1.

    Raises:
        ValueError: if ``factor`` is not a positive finite number, or T is a symbol, as it may be
            under `jax.export`.

    Example:
        >>> capacity_for(moejax.top_k(jnp.ones((10, 4)), k=2), factor=1.25)
        7
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"`factor` must be a positive number, slots in units of the mean load; got {factor}."
        )
    if not isinstance(routing.experts.size, int):
        raise ValueError(
            "`capacity_for` needs a known number of tokens to make a number of slots, got "
            f"{routing.experts.shape[0]}: pass `limit_capacity` a capacity of your own."
        )
    mean = routing.experts.size / routing.num_experts
    # Rounded first: 1.1 * 10 is a little more than 11 in floating point.
    return max(1, math.ceil(round(factor * mean, 6)))


def _choice_major(tokens: Array, k: int) -> Array:
    check_num_choices(tokens.size * k)
    return (tokens[None] * k + jnp.arange(k, dtype=jnp.int32)[:, None]).ravel()  # [K, T] -> [K T]


@takes(Routing)
def positions(routing: Routing, *, priority: Priority = by_choice) -> Array:
    """The place of every choice in the queue of its expert, from 0.

    Args:
        routing: a decision of T tokens with K choices each.
        priority: who is served first.

    Returns:
        Places, int32 [T, K]. Choices of weight zero stand after all others of their expert, and
        those that go nowhere are counted in a queue of their own.

    Example:
        >>> positions(moejax.top_k(jnp.array([[1.0, 2.0], [1.0, 2.0]]), k=2))
        Array([[0, 0],
               [1, 1]], dtype=int32)
    """
    order = priority(routing)
    num_experts = routing.num_experts  # read first: it checks the ids
    queue, idle = (values.ravel()[order] for values in (routing.experts, routing.weights == 0))
    places = places_in_queue(queue, idle, num_experts)  # [T K]
    return jnp.zeros_like(places).at[order].set(places).reshape(routing.experts.shape)


@takes(Routing)
def mask_tokens(routing: Routing, mask: Array) -> Routing:
    """Sends masked tokens nowhere: expert id E, weight zero, scores zero.

    `moe` does this itself. A rule of your own that does more after choosing, such as
    `limit_capacity`, must call it first, so that padding takes no slot.

    Args:
        routing: a decision of T tokens among E experts.
        mask: False for padding, booleans [T].

    Returns:
        The decision, in which tokens that are False in ``mask`` take no part.

    Raises:
        ValueError: if the mask is not booleans [T].

    Example:
        >>> routing = mask_tokens(moejax.switch(jnp.eye(2)), jnp.array([True, False]))
        >>> routing.experts
        Array([[0],
               [2]], dtype=int32)
    """
    check_mask(mask, routing.experts.shape[:1])
    kept = mask[:, None]  # [T, 1]
    return routing._replace(
        experts=jnp.where(kept, routing.experts, routing.num_experts),  # E means nowhere
        weights=jnp.where(kept, routing.weights, 0),
        scores=jnp.where(kept, routing.scores, 0),
    )
