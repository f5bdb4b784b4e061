"""What did not fit the batched pass: a loop over blocks of rows, one expert per block.

The loop has as many trips as there are blocks, a number that only the data knows. Reverse mode
through such a loop is not defined, but the derivative of the loop is again a loop of the same
form, with the derivative of its body: ``block_loop`` says so, and is differentiable any number
of times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moejax.types import Array

Tree = Any  # a pytree of arrays


class Operands(NamedTuple):
    """What a block reads, or what it adds to, by the way it is indexed.

    Attributes:
        params: one entry per expert, leaves ``[E, ...]``; a block sees ``[...]``.
        tokens: one entry per token, leaves ``[T, ...]``; a block sees ``[B, ...]``.
        choices: one entry per (choice, token) pair, leaves ``[K * T, ...]``; a block sees
            ``[B, ...]``, with zeros in the rows that pad it.
        shared: what every block sees whole.
    """

    params: Tree = ()
    tokens: Tree = ()
    choices: Tree = ()
    shared: Tree = ()


class Rows(NamedTuple):
    """Which rows the loop visits: ``order[begin[e]:end[e]]`` for every expert e.

    Attributes:
        order: (choice, token) pairs ``k * T + t`` sorted by expert, shape [K * T].
        begin: first row of each expert, shape [E].
        end: one past the last row of each expert, shape [E].
    """

    order: Array
    begin: Array
    end: Array


class Block(NamedTuple):
    """Where a block reads and writes.

    Attributes:
        expert: whose block it is, a scalar.
        choice: the (choice, token) pair of each row, shape [B].
        inside: whether a row is one of the expert's, shape [B].
    """

    expert: Array
    choice: Array
    inside: Array


Body = Callable[[Operands], Operands]

SIDE = 2  # blocks side by side


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_loop(body: Body, size: int, rows: Rows, operands: Operands, init: Operands) -> Operands:
    """Adds to ``init`` what ``body`` makes of every block of at most ``size`` rows.

    A padded row is a copy of a real one (so that an expert never sees values that are not in
    the data) with zeros for its choices; what ``body`` returns for it is dropped. What it adds
    to the parameters must therefore vanish with the choices, which holds for
    ``weight * expert(params, x)`` and for all its derivatives.

    Args:
        body: maps one block of operands to what is to be added, for one block.
        size: rows per block, B.
        rows: which rows to visit.
        operands: what the blocks read.
        init: what the blocks add to; the result has the same structure.

    Returns:
        ``init`` plus the sum over all blocks.
    """
    return _run(body, size, rows, operands, init)


def _forward(body: Body, size: int, rows: Rows, operands: Operands, init: Operands) -> Any:
    return _run(body, size, rows, operands, init), (rows, operands)


def _backward(body: Body, size: int, saved: Any, cotangent: Operands) -> Any:
    rows, operands = saved
    zeros = jax.tree.map(jnp.zeros_like, differentiable(operands))
    return None, add_cotangents(body, size, rows, operands, cotangent, zeros), cotangent


block_loop.defvjp(_forward, _backward)


def add_cotangents(
    body: Body, size: int, rows: Rows, operands: Operands, cotangent: Operands, init: Operands
) -> Operands:
    """Adds to ``init`` the cotangents of ``operands``: the backward pass of ``block_loop``.

    ``init`` has None where an operand is not differentiable, and so has the result.
    """

    def derivative(block: Operands) -> Operands:
        given, cotangents = (Operands(*side) for side in zip(*block, strict=True))
        _, pullback = jax.vjp(lambda some: body(merge(some, given)), differentiable(given))
        return pullback(cotangents)[0]

    both = Operands(*zip(operands, cotangent, strict=True))
    return block_loop(derivative, size, rows, both, init)


def differentiable(tree: Tree) -> Tree:
    """The tree with None in the place of leaves that have no gradient, such as integers."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, tree)


def merge(some: Tree, tree: Tree) -> Tree:
    """``some`` with its None leaves filled from ``tree``: undoes ``differentiable``."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, tree, is_leaf=lambda a: a is None)


def _run(body: Body, size: int, rows: Rows, operands: Operands, init: Operands) -> Operands:
    """The loop itself. Under ``vmap`` it runs once per example, each with its own trip count."""
    blocks = (jnp.maximum(rows.end - rows.begin, 0) + size - 1) // size  # [E]
    last = jnp.cumsum(blocks)  # [E]: blocks of the experts up to and with this one

    @sequential_vmap
    def run(rows: Rows, last: Array, operands: Operands, init: Operands) -> Operands:
        def step(trip: Array, total: Operands) -> Operands:
            index = trip * SIDE + jnp.arange(SIDE, dtype=trip.dtype)
            where = jax.vmap(partial(_locate, rows, last, size))(index)
            taken = jax.vmap(partial(_take, operands))(where)
            return _add(total, where, jax.vmap(body)(taken))

        trips = (last[-1] + SIDE - 1) // SIDE
        return jax.lax.fori_loop(jnp.zeros((), last.dtype), trips, step, init)

    return run(rows, last, operands, init)


def _locate(rows: Rows, last: Array, size: int, index: Array) -> Block:
    """The block of this number; one past the last block has no row inside."""
    expert = jnp.searchsorted(last, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, len(last) - 1)
    before = jnp.where(expert > 0, last[expert - 1], 0)
    row = rows.begin[expert] + (index - before) * size + jnp.arange(size, dtype=jnp.int32)  # [B]
    choice = rows.order[jnp.minimum(row, rows.end[expert] - 1)]
    return Block(expert, choice, row < rows.end[expert])


def _take(operands: Operands, block: Block) -> Operands:
    """What one block reads of every operand."""
    params, tokens, choices, shared = operands

    def token_rows(a: Array) -> Array:
        return a.at[block.choice % a.shape[0]].get(mode="promise_in_bounds")

    def choice_rows(a: Array) -> Array:
        kept = block.inside.reshape(block.inside.shape + (1,) * (a.ndim - 1))
        taken = a.at[block.choice].get(mode="promise_in_bounds")
        return jnp.where(kept, taken, jnp.zeros((), a.dtype))

    return Operands(
        jax.tree.map(lambda a: a.at[block.expert].get(mode="promise_in_bounds"), params),
        jax.tree.map(token_rows, tokens),
        jax.tree.map(choice_rows, choices),
        shared,
    )


def _add(total: Operands, where: Block, blocks: Operands) -> Operands:
    """Adds what the blocks [S, ...] gave to the totals, in place; padded rows are dropped."""
    choice, inside = where.choice.reshape(-1), where.inside.reshape(-1)  # [S, B] -> [S B]

    def to_expert(a: Array, entries: Array) -> Array:
        # A scatter to a few experts would go element by element.
        for expert, entry in zip(where.expert, entries, strict=True):
            entry += jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)
            a = jax.lax.dynamic_update_index_in_dim(a, entry, expert, 0)
        return a

    def to_tokens(a: Array, rows: Array) -> Array:
        token = jnp.where(inside, choice % a.shape[0], a.shape[0])
        return a.at[token].add(rows.reshape(-1, *a.shape[1:]), mode="drop")

    def to_choices(a: Array, rows: Array) -> Array:
        own = jnp.where(inside, choice, a.shape[0])
        return a.at[own].add(rows.reshape(-1, *a.shape[1:]), mode="drop")

    return Operands(
        jax.tree.map(to_expert, total.params, blocks.params),
        jax.tree.map(to_tokens, total.tokens, blocks.tokens),
        jax.tree.map(to_choices, total.choices, blocks.choices),
        jax.tree.map(lambda a, each: a + each.sum(axis=0), total.shared, blocks.shared),
    )
