"""The queue of each expert: choices sorted by expert, in the order in which they are served."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from moejax._checks import check_num_choices
from moejax._compiling import compiled
from moejax.base import Array


class Sorted(NamedTuple):
    """The choices sorted by expert; those that go nowhere stand at the end.

    Attributes:
        order: choices in the order of their experts, shape [K * T].
        starts: first position of each expert in ``order``, and the end of the last, shape [E + 1].
    """

    order: Array
    starts: Array


def sort_by_expert(experts: Array, weights: Array, num_experts: int) -> Sorted:
    """Sorts choices by expert; an expert serves first choices first, then in the order of tokens.

    Choices of weight zero come after all others of their expert.

    Args:
        experts: expert ids; an id outside of [0, E) means nowhere, shape [T, K].
        weights: their gates, shape [T, K].
        num_experts: E.

    Returns:
        The choices in their new order; choice k of token t has the number ``k T + t``.
    """
    queue, idle = experts.T.reshape(-1), (weights == 0).T.reshape(-1)  # [K * T]
    return sort_queue(queue, idle, num_experts)


@compiled("num_experts")
def sort_queue(queue: Array, idle: Array, num_experts: int) -> Sorted:
    """Sorts one queue of choices by expert, stably.

    Args:
        queue: the expert of each choice, first come first served; an id outside of [0, E) means
            nowhere, shape [N].
        idle: choices that come after all others of their expert, booleans [N].
        num_experts: E.

    Returns:
        Places in the queue, sorted by expert, [N], and where each expert starts among them.
    """
    check_num_choices(queue.size)
    ids, size = _ids(queue, num_experts), queue.size
    ranks = 2 * ids + idle.astype(jnp.int32)
    # Under `jax.export` the size may be a symbol, whose multiples cannot be compared with a number.
    if isinstance(size, int) and 2 * (num_experts + 1) * size < 2**31:
        # Expert and place in one integer: sorting one array of integers is several times as fast
        # on CPU as a stable sort of pairs.
        keys = jnp.sort(ranks * size + jnp.arange(size, dtype=jnp.int32), stable=False)
        bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) * (2 * size)
        return Sorted(keys % max(size, 1), jnp.searchsorted(keys, bounds).astype(jnp.int32))
    order = jnp.argsort(ranks, stable=True).astype(jnp.int32)
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[ids].add(1)
    return Sorted(order, jnp.cumsum(counts, dtype=jnp.int32) - counts)


@compiled("num_experts")
def places_in_queue(queue: Array, idle: Array, num_experts: int) -> Array:
    """How many choices of the same expert come before each choice of a queue.

    Args:
        queue: as in `sort_queue`, shape [N].
        idle: as in `sort_queue`, booleans [N].
        num_experts: E.

    Returns:
        Places from 0, int32 [N]; choices that go nowhere share one queue of their own.
    """
    order, starts = sort_queue(queue, idle, num_experts)
    # A sort, not a cumulative sum over a one-hot array [N, E]: it is exact and takes less memory.
    places = jnp.arange(queue.size, dtype=jnp.int32) - starts[_ids(queue, num_experts)[order]]
    return jnp.zeros(queue.size, jnp.int32).at[order].set(places, unique_indices=True)


def _ids(queue: Array, num_experts: int) -> Array:
    nowhere = (queue < 0) | (queue >= num_experts)
    return jnp.where(nowhere, num_experts, queue).astype(jnp.int32)
