"""The batched pass: every expert on its slots, all at once or a few experts at a time.

The backward pass recomputes what lies inside the experts of a chunk: that takes no longer than
reading what the forward pass would have written, and half the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax._arrays import separate_zeros
from moejax.base import Array, Params
from moejax.schedules._sorted.closing import Apply
from moejax.schedules._sorted.overflow import Operands, Tree, differentiable, merge
from moejax.schedules._sorted.policy import Group, Policy, experts_per_chunk
from moejax.schedules._sorted.slots import Slots, collect, gates_of_slots, sum_over_features


class PerExpert(NamedTuple):
    """What a pass computes for one expert, or stacked for all.

    Attributes:
        by_expert: one entry per expert; stacked along a leading axis E, in the experts' own order.
        by_slot: one entry per slot of the expert, leaves ``[C, ...]``; together ``[S, ...]``.
    """

    by_expert: Tree = ()
    by_slot: Tree = ()


def outputs_of_slots(apply: Apply, policy: Policy, slots: Slots, operands: Operands) -> Array:
    """The outputs of every expert on its slots, ``[T, ...] -> [S, ...]``.

    Args:
        apply: the expert, for one expert's parameters and C rows.
        policy: how many slots the experts have, and how many are computed together.
        slots: which choice stands in which slot.
        operands: parameters, tokens, gates of the choices, and what the expert closes over.

    Returns:
        Outputs, shape [S, ...]; those of empty slots are not read.
    """
    x = operands.tokens

    def one(params: Params, choice: Array) -> PerExpert:
        return PerExpert(by_slot=apply(params, x[choice % x.shape[0]], operands.shared))

    return _every_expert(one, policy, slots, operands.params, slots.choice).by_slot


def cotangents(
    apply: Apply,
    policy: Policy,
    slots: Slots,
    operands: Operands,
    outputs: Array,
    cotangent: Array,
) -> Operands:
    """The cotangents of the operands, from the cotangent of the gated sum over the slots.

    Args:
        apply: the expert, for one expert's parameters and C rows.
        policy: how many slots the experts have, and how many are computed together.
        slots: which choice stands in which slot.
        operands: parameters, tokens, gates of the choices, and what the expert closes over.
        outputs: from `outputs_of_slots`, shape [S, ...].
        cotangent: of the sum, shape [T, ...].

    Returns:
        The cotangents, with None for operands that have none.
    """
    x, weights = operands.tokens, operands.choices

    def one(params: Params, choice: Array, gates: Array) -> PerExpert:
        given = Operands(params, x[choice % x.shape[0]], shared=operands.shared)
        to_outputs = gates.reshape(gates.shape + (1,) * (cotangent.ndim - 1))
        to_outputs *= cotangent[choice % x.shape[0]]

        def outputs_of(some: Operands) -> Array:
            params, x, _, shared = merge(some, given)
            return apply(params, x, shared)

        _, pullback = jax.vjp(outputs_of, differentiable(given))
        params, tokens, _, shared = pullback(to_outputs.astype(outputs.dtype))[0]
        return PerExpert((params, shared), tokens)

    gates = gates_of_slots(weights, slots)
    each = _every_expert(one, policy, slots, operands.params, slots.choice, gates)
    params, shared = clear(slots.unused, slots.num_unused, each.by_expert)
    return Operands(
        params,
        jax.tree.map(lambda rows: collect(rows, slots.slot), each.by_slot),
        sum_over_features(cotangent, outputs, slots.slot).reshape(weights.shape),
        jax.tree.map(lambda each: each.sum(axis=0), shared),
    )


@jax.custom_vjp
def clear(experts: Array, count: Array, tree: Tree) -> Tree:
    """The leaves [E, ...] with zeros for the first ``count`` of these experts, in place.

    An expert without choices still computes rows, on which it may overflow, and zero times infinity
    is not zero. A `where` would read and write every expert's gradient to clear a few.
    """

    def one(i: Array, tree: Tree) -> Tree:
        return jax.tree.map(lambda a: a.at[experts[i]].set(0), tree)

    return jax.lax.fori_loop(jnp.zeros((), count.dtype), count, one, tree)


def _clear_backward(saved: tuple[Array, Array], tree: Tree) -> tuple[None, None, Tree]:
    return None, None, clear(*saved, tree)


clear.defvjp(
    lambda experts, count, tree: (clear(experts, count, tree), (experts, count)), _clear_backward
)


def _every_expert(
    one: Callable[..., PerExpert], policy: Policy, slots: Slots, params: Params, *by_slot: Array
) -> PerExpert:
    """``one(params [...], *by_slot [C, ...])`` for every expert."""
    if policy.chunked:
        return _by_chunks(one, policy.groups, slots.expert, params, *by_slot)
    [group] = policy.groups
    return _at_once(one, group, params, *by_slot)


def _at_once(
    one: Callable[..., PerExpert], group: Group, params: Params, *by_slot: Array
) -> PerExpert:
    """All experts in one batch, in their own order."""
    shaped = [a.reshape(*group, *a.shape[1:]) for a in by_slot]  # [E, C, ...]
    results = jax.vmap(one)(params, *shaped)
    return results._replace(by_slot=jax.tree.map(_flat, results.by_slot))


def _by_chunks(
    one: Callable[..., PerExpert],
    groups: tuple[Group, ...],
    expert: Array,
    params: Params,
    *by_slot: Array,
) -> PerExpert:
    """A few experts at a time, each with the same number of slots."""

    def step(total: Tree, chunk: tuple[Array, ...]) -> tuple[Tree, Tree]:
        experts, *rows = chunk
        some = jax.tree.map(lambda a: a.at[experts].get(mode="promise_in_bounds"), params)
        results = _several(one, some, *rows)

        def put(a: Array, new: Array) -> Array:
            return a.at[experts].set(new, mode="promise_in_bounds", unique_indices=True)

        return jax.tree.map(put, total, results.by_expert), results.by_slot

    total = _zeros_by_expert(one, groups, params, *by_slot)
    rows = []
    for chunks in _chunks(groups, expert, by_slot):
        total, some_rows = jax.lax.scan(step, total, chunks)
        rows.append(jax.tree.map(lambda a: _flat(_flat(a)), some_rows))
    return PerExpert(total, jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows))


def _several(one: Callable[..., PerExpert], *stacked: Any) -> PerExpert:
    """``one`` for a few experts, [n, ...] -> [n, ...].

    A single expert is not batched: XLA computes a batch of one product half as fast.
    """
    if len(jax.tree.leaves(stacked)[0]) > 1:
        return jax.vmap(one)(*stacked)
    first = jax.tree.map(lambda a: a[0], stacked)
    return jax.tree.map(lambda a: a[None], one(*first))


def _zeros_by_expert(
    one: Callable[..., PerExpert],
    groups: tuple[Group, ...],
    params: Params,
    *by_slot: Array,
) -> Any:
    """Zeros like the ``by_expert`` of ``one``, stacked along E; ``by_slot[0]`` holds choices."""
    some = [a[: groups[0].capacity] for a in by_slot]
    # The experts may have no parameters that tell how many they are.
    over_experts = jax.vmap(
        one, in_axes=(0, *[None] * len(some)), axis_size=sum(group.size for group in groups)
    )
    shapes = jax.eval_shape(over_experts, params, *some)
    return separate_zeros(shapes.by_expert, by_slot[0][0])


def _chunks(
    groups: tuple[Group, ...], expert: Array, by_slot: tuple[Array, ...]
) -> Iterator[tuple[Array, ...]]:
    """For each group of experts its chunks: experts ``[N, n]``, and slots ``[N, n, C, ...]``."""
    first, begin = 0, 0
    for size, capacity in groups:
        chunk = experts_per_chunk(size, capacity)
        shape = size // chunk, chunk
        last, end = first + size, begin + size * capacity
        rows = (a[begin:end].reshape(*shape, capacity, *a.shape[1:]) for a in by_slot)
        yield expert[first:last].reshape(shape), *rows
        first, begin = last, end


def _flat(a: Array) -> Array:
    """Merges the two leading axes."""
    return a.reshape(-1, *a.shape[2:])
