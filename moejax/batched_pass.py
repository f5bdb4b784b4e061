"""The batched pass: every expert on its slots, a few experts at a time.

On CPU the experts go in chunks, so that what lies between an expert's products stays in the
processor's cache, and memory is taken for one chunk only. The backward pass computes the outputs
of a chunk again: reading what the forward pass had written took as long where experts have some
hundred tokens each, and needed twice the memory. A chunk whose slots are all empty is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.blocks import Operands, differentiable, merge
from moejax.dispatch import Slots, collect, gates_of_slots, sum_over_features
from moejax.types import Array, Params

Apply = Callable[[Params, Array, list[Array]], Array]  # (params, x, what it closes over) -> y
Tree = Any

ROWS = 1024  # of a chunk. 512 and 2,048 took as long or up to a sixth longer.


def outputs_of_slots(apply: Apply, operands: Operands, slots: Slots) -> Array:
    """What every expert makes of its slots, ``[T, ...] -> [E, C, ...]``.

    Args:
        apply: the expert, for one expert's parameters and C rows.
        operands: parameters, tokens, gates of the choices, and what the expert closes over.
        slots: who stands where; an empty slot may give anything.
    """
    x = operands.tokens

    def one(params: Params, choice: Array) -> Array:
        return apply(params, x[choice % len(x)], operands.shared)

    return _by_chunks(one, slots.filled, (operands.params, slots.choice))


def cotangents(
    apply: Apply, operands: Operands, slots: Slots, outputs: Array, cotangent: Array
) -> Operands:
    """The cotangents of the operands, given that of the gated sum over the slots.

    Args:
        apply: as for `outputs_of_slots`.
        operands: as for `outputs_of_slots`.
        slots: as for `outputs_of_slots`.
        outputs: from `outputs_of_slots`, shape [E, C, ...].
        cotangent: of the sum, shape [T, ...].

    Returns:
        The cotangents, None in the place of operands that have none.
    """
    x, weights = operands.tokens, operands.choices

    def one(params: Params, choice: Array, gates: Array) -> Operands:
        given = Operands(params, x[choice % len(x)], shared=operands.shared)
        to_outputs = gates.reshape(gates.shape + (1,) * (cotangent.ndim - 1))
        to_outputs *= cotangent[choice % len(x)]

        def outputs_of(some: Operands) -> Array:
            return apply(*_arguments(merge(some, given)))

        _, pullback = jax.vjp(outputs_of, differentiable(given))
        return pullback(to_outputs.astype(outputs.dtype))[0]

    by_expert = operands.params, slots.choice, gates_of_slots(weights, slots)
    params, tokens, _, shared = _by_chunks(one, slots.filled, by_expert)
    return Operands(
        params,
        jax.tree.map(lambda rows: collect(rows, slots), tokens),
        sum_over_features(cotangent, outputs, slots).reshape(weights.shape),
        jax.tree.map(lambda each: each.sum(axis=0), shared),
    )


def _arguments(operands: Operands) -> tuple[Params, Array, list[Array]]:
    return operands.params, operands.tokens, operands.shared


def _by_chunks(one: Callable[..., Tree], filled: Array, args: Tree) -> Tree:
    """``one`` for every expert, leaves ``[E, ...]``; zeros where a whole chunk has no tokens."""
    num_experts, capacity = filled.shape
    # At least two: XLA runs the products of one expert alone another way, half as fast.
    size = max(2, ROWS // capacity)
    some = partial(_unless_empty, jax.vmap(one))
    if size >= num_experts:
        return some(filled, args)
    return jax.lax.platform_dependent(filled, args, cpu=partial(_scan, some, size), default=some)


def _unless_empty(run: Callable[..., Tree], filled: Array, args: Tree) -> Tree:
    shapes = jax.eval_shape(run, *args)
    zeros = lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)  # noqa: E731
    return jax.lax.cond(filled.any(), run, zeros, *args)


def _scan(some: Callable[[Array, Tree], Tree], size: int, filled: Array, args: Tree) -> Tree:
    """Chunks of ``size`` experts one after the other, and what is left by itself."""
    whole = len(filled) // size * size
    chunks = lambda a: a[:whole].reshape(-1, size, *a.shape[1:])  # noqa: E731
    results = jax.lax.map(lambda chunk: some(*chunk), jax.tree.map(chunks, (filled, args)))
    results = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), results)
    if whole == len(filled):
        return results
    last = some(*jax.tree.map(lambda a: a[whole:], (filled, args)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), results, last)
