"""The batched pass: every expert on its slots, a few experts at a time.

On CPU the experts go in chunks, so that what lies between an expert's products stays in the
processor's cache, and memory is taken for one chunk only. The backward pass computes the outputs
of a chunk again: reading what the forward pass had written took as long where experts have some
hundred tokens each, and needed twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.base import Array, Params
from moejax.schedules._sorted.overflow import Operands, Tree, differentiable, merge
from moejax.schedules._sorted.slots import (
    Group,
    Slots,
    collect,
    gates_of_slots,
    one_group,
    sum_over_features,
)

Apply = Callable[[Params, Array, list[Array]], Array]  # (params, x, what it closes over) -> y

# Of all experts together up to which they are computed at once, without copying parameters: at 64
# experts of 20 rows that took 6.7 ms where chunks took 9.1, and with thrice the rows as long.
ROWS = 1280


class Each(NamedTuple):
    """What is made of one expert.

    Attributes:
        by_expert: stacked along a leading axis E, in the experts' own order.
        by_slot: one entry per slot of the expert, leaves ``[C, ...]``.
    """

    by_expert: Tree = ()
    by_slot: Tree = ()


def outputs_of_slots(
    apply: Apply, groups: tuple[Group, ...], slots: Slots, operands: Operands
) -> Array:
    """What every expert makes of its slots, ``[T, ...] -> [S, ...]``.

    Args:
        apply: the expert, for one expert's parameters and C rows.
        groups: how many slots the experts have.
        slots: who stands where; an empty slot may give anything.
        operands: parameters, tokens, gates of the choices, and what the expert closes over.
    """
    x = operands.tokens

    def one(params: Params, choice: Array) -> Each:
        return Each(by_slot=apply(params, x[choice % len(x)], operands.shared))

    return _every_expert(one, groups, slots, operands.params, slots.choice).by_slot


def cotangents(
    apply: Apply,
    groups: tuple[Group, ...],
    slots: Slots,
    operands: Operands,
    outputs: Array,
    cotangent: Array,
) -> Operands:
    """The cotangents of the operands, given that of the gated sum over the slots.

    Args:
        apply: as for `outputs_of_slots`.
        groups: as for `outputs_of_slots`.
        slots: as for `outputs_of_slots`.
        operands: as for `outputs_of_slots`.
        outputs: from `outputs_of_slots`, shape [S, ...].
        cotangent: of the sum, shape [T, ...].

    Returns:
        The cotangents, None in the place of operands that have none.
    """
    x, weights = operands.tokens, operands.choices

    def one(params: Params, choice: Array, gates: Array) -> Each:
        given = Operands(params, x[choice % len(x)], shared=operands.shared)
        to_outputs = gates.reshape(gates.shape + (1,) * (cotangent.ndim - 1))
        to_outputs *= cotangent[choice % len(x)]

        def outputs_of(some: Operands) -> Array:
            params, x, _, shared = merge(some, given)
            return apply(params, x, shared)

        _, pullback = jax.vjp(outputs_of, differentiable(given))
        params, tokens, _, shared = pullback(to_outputs.astype(outputs.dtype))[0]
        return Each((params, shared), tokens)

    gates = gates_of_slots(weights, slots)
    each = _every_expert(one, groups, slots, operands.params, slots.choice, gates)
    params, shared = each.by_expert
    return Operands(
        params,
        jax.tree.map(lambda rows: collect(rows, slots), each.by_slot),
        sum_over_features(cotangent, outputs, slots).reshape(weights.shape),
        jax.tree.map(lambda each: each.sum(axis=0), shared),
    )


def _every_expert(
    one: Callable[..., Each],
    groups: tuple[Group, ...],
    slots: Slots,
    params: Params,
    *by_slot: Array,
) -> Each:
    """``one(params [...], *by_slot [C, ...])`` for every expert."""
    at_once = partial(_at_once, one, one_group(groups))
    if slots.filled.size <= ROWS and len(groups) == 1:
        return at_once(params, *by_slot)
    chunked = partial(_by_chunks, one, groups, slots.expert)
    return jax.lax.platform_dependent(params, *by_slot, cpu=chunked, default=at_once)


def _at_once(one: Callable[..., Each], group: Group, params: Params, *by_slot: Array) -> Each:
    """All experts in one batch; all have the same number of slots, in their own order."""
    shaped = [a.reshape(*group, *a.shape[1:]) for a in by_slot]  # [E, C, ...]
    results = jax.vmap(one)(params, *shaped)
    return results._replace(by_slot=jax.tree.map(_flat, results.by_slot))


def _by_chunks(
    one: Callable[..., Each],
    groups: tuple[Group, ...],
    expert: Array,
    params: Params,
    *by_slot: Array,
) -> Each:
    """A few experts of equally many slots at a time."""

    def step(total: Tree, chunk: tuple[Array, ...]) -> tuple[Tree, Tree]:
        experts, *slots = chunk
        some = jax.tree.map(lambda a: a.at[experts].get(mode="promise_in_bounds"), params)
        results = jax.vmap(one)(some, *slots)
        put = lambda a, new: a.at[experts].set(  # noqa: E731
            new, mode="promise_in_bounds", unique_indices=True
        )
        return jax.tree.map(put, total, results.by_expert), results.by_slot

    shapes = jax.eval_shape(partial(_at_once, one, one_group(groups)), params, *by_slot)
    total = jax.tree.map(jnp.zeros_like, shapes.by_expert)
    rows = []
    for chunks in _chunks(groups, expert, by_slot):
        total, some_rows = jax.lax.scan(step, total, chunks)
        rows.append(jax.tree.map(lambda a: _flat(_flat(a)), some_rows))
    return Each(total, jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows))


def _chunks(
    groups: tuple[Group, ...], expert: Array, by_slot: tuple[Array, ...]
) -> Iterator[tuple[Array, ...]]:
    """For each group of experts its chunks: experts ``[N, n]``, and slots ``[N, n, C, ...]``."""
    first, begin = 0, 0
    for size, capacity in groups:
        chunk = _chunk(size, capacity)
        shape = size // chunk, chunk
        end = begin + size * capacity
        slots = (a[begin:end].reshape(*shape, capacity, *a.shape[1:]) for a in by_slot)
        yield expert[first : first + size].reshape(shape), *slots
        first, begin = first + size, end


def _flat(a: Array) -> Array:
    """One leading axis in the place of two."""
    return a.reshape(-1, *a.shape[2:])


def _chunk(num_experts: int, capacity: int) -> int:
    """Experts per chunk: a number that divides theirs.

    Not one: XLA runs the product of one expert alone another way, half as fast. Not more than 4: a
    chunk copies its experts' parameters, and at 256 experts those of 8 took 184 ms with backward
    where those of 4 took 161. Not twice the rows: at 128 experts 370 ms instead of 341. A last
    chunk of another size would make every result be copied, for half the time again.
    """
    sizes = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
    fitting = [n for n in sizes if n <= 4 and 2 * n * capacity <= ROWS]
    return max(fitting, default=min(sizes, default=1))
