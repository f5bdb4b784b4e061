"""From "which expert each token chose" to "which tokens each expert gets": positions and slots.

A *choice* is one (choice, token) pair, numbered ``j = k * T + t``: all first choices come before
any second choice, and within those the tokens keep their order. That order is the priority with
which ``capacity`` fills its slots. A *slot* is one row of an expert's batch, numbered
``s = e * C + c``.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import jax
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


@jax.custom_vjp
def dispatch(x: Array, slots: Slots) -> Array:
    """The tokens in their slots, ``[T, ...] -> [E, C, ...]``; an empty slot repeats some token.

    The gradient is ``collect``: a gather as well, where differentiating a gather would scatter.
    """
    return x[slots.choice % x.shape[0]]


@jax.custom_vjp
def collect(rows: Array, slots: Slots) -> Array:
    """The sum over every token's slots, ``[E, C, ...] -> [T, ...]``: ``dispatch`` transposed."""
    flat = [_rows_at(rows, slot) for slot in slots.slot]
    return reduce(jnp.add, flat)


dispatch.defvjp(
    lambda x, slots: (dispatch(x, slots), slots),
    lambda slots, rows: (collect(rows, slots), None),
)
collect.defvjp(
    lambda rows, slots: (collect(rows, slots), slots),
    lambda slots, x: (dispatch(x, slots), None),
)


@jax.custom_vjp
def combine(rows: Array, weights: Array, slots: Slots) -> Array:
    """The gated sum over every token's slots, ``[E, C, ...] -> [T, ...]``.

    ``y_t = sum_k weights_kt rows_slot(k, t)``, in the dtype of the weights. The weights multiply
    rows as they are gathered, so that no weighted copy of the rows is made.

    Args:
        rows: one row per slot, shape [E, C, ...].
        weights: gates, shape [K, T]; those of choices without a slot do not matter.
        slots: who stands where.
    """
    # Not an einsum: XLA would gather [T, K, ...] first, and run one small product per token.
    weighted = [
        w.reshape(w.shape + (1,) * (rows.ndim - 2)) * _rows_at(rows, slot).astype(w.dtype)
        for w, slot in zip(weights, slots.slot, strict=True)
    ]
    return reduce(jnp.add, weighted)


def _rows_at(rows: Array, slot: Array) -> Array:
    """The rows in these slots, ``[E, C, ...], [T] -> [T, ...]``, zero where there is no slot."""
    return rows.reshape(-1, *rows.shape[2:]).at[slot].get(mode="fill", fill_value=0)


def _combine_backward(saved: tuple, cotangent: Array) -> tuple:
    rows, weights, slots = saved
    of_slot = jnp.where(slots.filled, weights.reshape(-1)[slots.choice], 0)  # [E, C]
    of_slot = of_slot.reshape(of_slot.shape + (1,) * (rows.ndim - 2))
    to_rows = (dispatch(cotangent, slots) * of_slot).astype(rows.dtype)
    axes = tuple(range(1, cotangent.ndim))
    to_weights = [
        jnp.sum(cotangent * _rows_at(rows, slot).astype(weights.dtype), axes) for slot in slots.slot
    ]
    return to_rows, jnp.stack(to_weights), None


combine.defvjp(
    lambda rows, weights, slots: (combine(rows, weights, slots), (rows, weights, slots)),
    _combine_backward,
)
