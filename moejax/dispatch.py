"""From "which expert each token chose" to "which tokens each expert gets": positions and slots.

A *choice* is one (choice, token) pair, numbered ``j = k * T + t``: all first choices come before
any second choice, and within those the tokens keep their order. That order is the priority with
which ``capacity`` fills its slots. A *slot* is one row of an expert's batch, numbered
``s = e * C + c``.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp

from moejax.types import Array


class Sorted(NamedTuple):
    """The choices sorted by expert; those that go nowhere stand at the end.

    Attributes:
        order: choices in the order of their experts, shape [K * T].
        starts: first position of each expert in ``order``, and the end of the last, shape [E + 1].
    """

    order: Array
    starts: Array


class Slots(NamedTuple):
    """Which choice stands in which slot.

    Attributes:
        choice: the choice in every slot; empty slots repeat a choice that is there, shape [E, C].
        filled: whether a slot is not empty, shape [E, C].
        slot: the slot of every choice, E * C for a choice without one, shape [K, T].
    """

    choice: Array
    filled: Array
    slot: Array


def sort_by_expert(experts: Array, num_experts: int) -> Sorted:
    """Sorts choices by expert, stably, in integers throughout.

    Args:
        experts: expert ids in [0, E], where E means nowhere, shape [T, K].
        num_experts: E.
    """
    ids = experts.T.reshape(-1).astype(jnp.int32)  # [K * T]
    size = ids.size
    if (num_experts + 1) * size < 2**31:
        # Expert and choice in one integer: sorting one array of integers is several times as
        # fast on CPU as a stable sort of pairs.
        keys = jnp.sort(ids * size + jnp.arange(size, dtype=jnp.int32), stable=False)
        order = keys % max(size, 1)
    else:
        order = jnp.argsort(ids, stable=True).astype(jnp.int32)
        keys = ids[order]
        size = 1
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) * size
    return Sorted(order, jnp.searchsorted(keys, bounds).astype(jnp.int32))


def assign_slots(sorted_choices: Sorted, num_tokens: int, capacity: int) -> Slots:
    """Gives the first ``capacity`` choices of every expert a slot each.

    Args:
        sorted_choices: the choices sorted by expert.
        num_tokens: T.
        capacity: slots per expert, C.
    """
    order, starts = sorted_choices
    num_experts, size = starts.size - 1, order.size
    # Position c of expert e stands at starts[e] + c of the order.
    position = starts[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)  # [E, C]
    filled = position < starts[1:, None]
    choice = order[jnp.minimum(position, jnp.maximum(starts[-1] - 1, 0))]
    numbers = jnp.arange(num_experts * capacity, dtype=jnp.int32).reshape(position.shape)
    empty = jnp.full((size,), num_experts * capacity, jnp.int32)
    slot = empty.at[jnp.where(filled, choice, size)].set(numbers, mode="drop")
    return Slots(choice, filled, slot.reshape(-1, num_tokens))


def collect(rows: Array, slots: Slots) -> Array:
    """The sum over every token's slots, ``[E, C, ...] -> [T, ...]``: gathers, no scatter."""
    return reduce(jnp.add, [_rows_at(rows, slot) for slot in slots.slot])


def combine(rows: Array, weights: Array, slots: Slots) -> Array:
    """The gated sum over every token's slots, ``[E, C, ...] -> [T, ...]``.

    ``y_t = sum_k w_kt rows_slot(k, t)``, in the dtype of the weights. The weights multiply
    rows as they are gathered, so that no weighted copy of the rows is made.

    Args:
        rows: one row per slot, shape [E, C, ...].
        weights: gates of the choices, shape [K * T]; those without a slot do not matter.
        slots: who stands where.
    """
    # Not an einsum: XLA would gather [T, K, ...] first, and run one small product per token.
    weighted = [
        w.reshape(w.shape + (1,) * (rows.ndim - 2)) * _rows_at(rows, slot).astype(w.dtype)
        for w, slot in zip(weights.reshape(slots.slot.shape), slots.slot, strict=True)
    ]
    return reduce(jnp.add, weighted)


def gates_of_slots(weights: Array, slots: Slots) -> Array:
    """The gate of the choice in every slot, ``[K * T] -> [E, C]``; zero in an empty slot."""
    return jnp.where(slots.filled, weights[slots.choice], jnp.zeros((), weights.dtype))


def sum_over_features(x: Array, rows: Array, slots: Slots) -> Array:
    """``sum_d x_td rows_slot(k, t)d``, ``[T, ...], [E, C, ...] -> [K, T]``, in the dtype of x."""
    axes = tuple(range(1, x.ndim))
    sums = [jnp.sum(x * _rows_at(rows, slot).astype(x.dtype), axes) for slot in slots.slot]
    return jnp.stack(sums)


def _rows_at(rows: Array, slot: Array) -> Array:
    """The rows in these slots, ``[E, C, ...], [T] -> [T, ...]``, zero where there is no slot."""
    return rows.reshape(-1, *rows.shape[2:]).at[slot].get(mode="fill", fill_value=0)
