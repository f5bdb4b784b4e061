"""From "which expert each token chose" to "which tokens each expert gets": positions and slots.

A *choice* is one (choice, token) pair, numbered ``j = k * T + t``: all first choices come before
any second choice, and within those the tokens keep their order. That order is the priority with
which ``capacity`` fills its slots. A *slot* is one row of an expert's batch. Slots are numbered
expert by expert; which expert comes first, and how many slots it has, may depend on the platform.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax._sorting import Sorted
from moejax.base import Array


class Group(NamedTuple):
    """Experts with equally many slots each.

    Attributes:
        size: number of experts.
        capacity: slots per expert, C.
    """

    size: int
    capacity: int


class Slots(NamedTuple):
    """Which choice stands in which slot.

    Attributes:
        expert: the experts in the order of their slots, shape [E].
        capacity: slots of every expert, by expert, shape [E].
        choice: choice in every slot; empty slots repeat a choice that is there, shape [S].
        filled: whether a slot is not empty, shape [S].
        slot: the slot of every choice, S for a choice without one, shape [K, T].
    """

    expert: Array
    capacity: Array
    choice: Array
    filled: Array
    slot: Array


def assign_slots(sorted_choices: Sorted, num_tokens: int, groups: tuple[Group, ...]) -> Slots:
    """Gives the first choices of every expert a slot each.

    Args:
        sorted_choices: the choices sorted by expert.
        num_tokens: T.
        groups: how many slots the experts have, those with most choices first. This is for CPU:
            elsewhere all experts have the mean, and keep their order.
    """
    order, starts = sorted_choices
    size, num_slots = order.size, sum(size * capacity for size, capacity in groups)
    expert, capacity, owner, nth = jax.lax.platform_dependent(
        jnp.diff(starts),
        cpu=partial(_by_load, groups),
        default=partial(_by_load, (one_group(groups),)),
    )
    # Slot c of expert e holds what stands at starts[e] + c of the order.
    position = starts[owner] + nth  # [S]
    filled = position < starts[owner + 1]
    choice = order[jnp.minimum(position, jnp.maximum(starts[-1] - 1, 0))]
    empty = jnp.full((size,), num_slots, jnp.int32)
    numbers = jnp.arange(num_slots, dtype=jnp.int32)
    slot = empty.at[jnp.where(filled, choice, size)].set(numbers, mode="drop")
    return Slots(expert, capacity, choice, filled, slot.reshape(-1, num_tokens))


def one_group(groups: tuple[Group, ...]) -> Group:
    """All experts with the mean of the slots, which must be a whole number."""
    size = sum(group.size for group in groups)
    return Group(size, sum(n * capacity for n, capacity in groups) // size)


def _by_load(groups: tuple[Group, ...], load: Array) -> tuple[Array, Array, Array, Array]:
    """The experts in the order of their slots and the slots of each expert, both ``[E]``.

    Then for every slot its expert, and which of the expert's slots it is, both ``[S]``.
    """
    expert = jnp.argsort(-load) if len(groups) > 1 else jnp.arange(load.size)
    expert = expert.astype(jnp.int32)
    sizes, capacities = np.array(groups, np.int32).T
    capacity = jnp.zeros(load.shape, jnp.int32).at[expert].set(np.repeat(capacities, sizes))

    members = jnp.split(expert, np.cumsum(sizes[:-1]))
    owner = [jnp.repeat(some, group.capacity) for some, group in zip(members, groups, strict=True)]
    nth = [jax.lax.broadcasted_iota(jnp.int32, group, 1).reshape(-1) for group in groups]
    return expert, capacity, jnp.concatenate(owner), jnp.concatenate(nth)


def collect(rows: Array, slots: Slots) -> Array:
    """The sum over every token's slots, ``[S, ...] -> [T, ...]``: gathers, no scatter."""
    return reduce(jnp.add, [_rows_at(rows, slot) for slot in slots.slot])


def combine(rows: Array, weights: Array, slots: Slots) -> Array:
    """The gated sum over every token's slots, ``[S, ...] -> [T, ...]``.

    ``y_t = sum_k w_kt rows_slot(k, t)``, in the dtype of the weights. The weights multiply
    rows as they are gathered, so that no weighted copy of the rows is made.

    Args:
        rows: one row per slot, shape [S, ...].
        weights: gates of the choices, shape [K * T]; those without a slot do not matter.
        slots: who stands where.
    """
    # Not an einsum: XLA would gather [T, K, ...] first, and run one small product per token.
    weighted = [
        w.reshape(w.shape + (1,) * (rows.ndim - 1)) * _rows_at(rows, slot).astype(w.dtype)
        for w, slot in zip(weights.reshape(slots.slot.shape), slots.slot, strict=True)
    ]
    return reduce(jnp.add, weighted)


def gates_of_slots(weights: Array, slots: Slots) -> Array:
    """The gate of the choice in every slot, ``[K * T] -> [S]``; zero in an empty slot."""
    return jnp.where(slots.filled, weights[slots.choice], jnp.zeros((), weights.dtype))


def sum_over_features(x: Array, rows: Array, slots: Slots) -> Array:
    """``sum_d x_td rows_slot(k, t)d``, ``[T, ...], [S, ...] -> [K, T]``, in the dtype of x."""
    axes = tuple(range(1, x.ndim))
    sums = [jnp.sum(x * _rows_at(rows, slot).astype(x.dtype), axes) for slot in slots.slot]
    return jnp.stack(sums)


def _rows_at(rows: Array, slot: Array) -> Array:
    """The rows in these slots, ``[S, ...], [T] -> [T, ...]``, zero where there is no slot."""
    return rows.at[slot].get(mode="fill", fill_value=0)
