"""From "which expert each token chose" to "which tokens each expert gets": slots.

A *choice* is a pair of a token and one of its K experts, numbered ``j = k * T + t``: all first
choices come before any second choice, and within those the tokens keep their order. That order is
the priority with which `capacity` fills its slots. A *slot* is one row of an expert's batch. Slots
are numbered expert by expert, in the order of the policy's groups.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax._sorting import Sorted
from moejax.base import Array
from moejax.schedules._sorted.policy import Group


class Slots(NamedTuple):
    """Which choice stands in which slot.

    Attributes:
        expert: the experts in the order of their slots, shape [E].
        unused: the experts, those without any choice first, shape [E].
        num_unused: how many experts have no choice, a scalar.
        capacity: slots of every expert, by expert, shape [E].
        choice: choice in every slot, shape [S]; an empty slot repeats its expert's first choice,
            so that no expert sees a token that did not choose it.
        filled: whether a slot is not empty, shape [S].
        slot: the slot of every choice, S for a choice without one, shape [K, T].
    """

    expert: Array
    unused: Array
    num_unused: Array
    capacity: Array
    choice: Array
    filled: Array
    slot: Array


def assign_slots(choices: Sorted, num_tokens: int, groups: tuple[Group, ...]) -> Slots:
    """Gives the first choices of every expert a slot each.

    Args:
        choices: the choices sorted by expert.
        num_tokens: T.
        groups: how many slots the experts have, experts with the most choices first.

    Returns:
        The slots.
    """
    order, starts = choices
    num_choices, num_slots = order.size, sum(size * capacity for size, capacity in groups)
    load = jnp.diff(starts)  # [E]
    expert, capacity = _by_load(groups, load)
    owner, nth = _owners(groups, expert)
    # Slot c of expert e holds the choice at position starts[e] + c of the order.
    position = starts[owner] + nth  # [S]
    filled = position < starts[owner + 1]
    # An expert without choices repeats another expert's; nobody reads its rows.
    last = jnp.maximum(starts[-1] - 1, 0)
    choice = order[jnp.minimum(jnp.where(filled, position, starts[owner]), last)]
    empty = jnp.full((num_choices,), num_slots, jnp.int32)
    numbers = jnp.arange(num_slots, dtype=jnp.int32)
    slot = empty.at[jnp.where(filled, choice, num_choices)].set(numbers, mode="drop")
    unused, num_unused = jnp.argsort(load > 0), jnp.sum(load == 0)
    slot = slot.reshape(-1, num_tokens)
    return Slots(expert, unused, num_unused, capacity, choice, filled, slot)


def _by_load(groups: tuple[Group, ...], load: Array) -> tuple[Array, Array]:
    """The experts in the order of their slots, and how many slots each expert has, both [E]."""
    expert = jnp.argsort(-load) if len(groups) > 1 else jnp.arange(load.size)
    expert = expert.astype(jnp.int32)
    sizes, capacities = np.array(groups, np.int32).T
    capacity = jnp.zeros(load.shape, jnp.int32).at[expert].set(np.repeat(capacities, sizes))
    return expert, capacity


def _owners(groups: tuple[Group, ...], expert: Array) -> tuple[Array, Array]:
    """For every slot its expert, and its number among the expert's slots, both [S]."""
    members = jnp.split(expert, np.cumsum([group.size for group in groups[:-1]]))
    owner = [jnp.repeat(some, group.capacity) for some, group in zip(members, groups, strict=True)]
    nth = [jax.lax.broadcasted_iota(jnp.int32, group, 1).reshape(-1) for group in groups]
    return jnp.concatenate(owner), jnp.concatenate(nth)


def combine(rows: Array, weights: Array, slot: Array) -> Array:
    """The gated sum over every token's slots, ``[S, ...] -> [T, ...]``.

    ``y_t = sum_k w_kt rows_slot(k, t)``, in the dtype of the weights. The weights multiply
    rows as they are gathered, so that no weighted copy of the rows is made.

    Args:
        rows: one row per slot, shape [S, ...].
        weights: gates of the choices, shape [K * T]; rows of choices without a slot are zeros.
        slot: the slot of every choice, S for none, shape [K, T].

    Returns:
        The sum, shape [T, ...].
    """
    # Not an einsum: XLA would gather [T, K, ...] first, and run one small product per token.
    weighted = [
        w.reshape(w.shape + (1,) * (rows.ndim - 1)) * rows_at(rows, one).astype(w.dtype)
        for w, one in zip(weights.reshape(slot.shape), slot, strict=True)
    ]
    return reduce(jnp.add, weighted)


def collect(rows: Array, slot: Array) -> Array:
    """The sum over every token's slots, ``[S, ...] -> [T, ...]``: gathers, no scatter."""
    return reduce(jnp.add, [rows_at(rows, one) for one in slot])


def gates_of_slots(weights: Array, slots: Slots) -> Array:
    """The gate of the choice in every slot, ``[K * T] -> [S]``; zero in an empty slot."""
    return jnp.where(slots.filled, weights[slots.choice], jnp.zeros((), weights.dtype))


def sum_over_features(x: Array, rows: Array, slot: Array) -> Array:
    """``sum_d x_td rows_slot(k, t)d``, ``[T, ...], [S, ...] -> [K, T]``, in the dtype of x."""
    axes = tuple(range(1, x.ndim))
    return jnp.stack([jnp.sum(x * rows_at(rows, one).astype(x.dtype), axes) for one in slot])


def rows_at(rows: Array, slot: Array) -> Array:
    """The rows in these slots, ``[S, ...], [T] -> [T, ...]``, zero where there is no slot."""
    return rows.at[slot].get(mode="fill", fill_value=0)
