"""What did not fit the batched pass: a loop over blocks of rows, one expert per block.

The loop has as many trips as there are blocks, a number that only the data knows. Reverse mode
through such a loop is not defined. But its derivative is a loop of the same form, over the
derivative of its body; `block_loop` is defined that way, so it can be differentiated any number of
times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moejax.base import Array

Tree = Any  # a pytree of arrays


class Operands(NamedTuple):
    """The arrays that a block reads or adds to, grouped by how they are indexed.

    Attributes:
        params: one entry per expert, leaves ``[E, ...]``; a block sees ``[...]``.
        tokens: one entry per token, leaves ``[T, ...]``; a block sees ``[B, ...]``.
        choices: one entry per choice, leaves ``[K * T, ...]``; a block sees
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
        order: choices ``k * T + t`` sorted by expert, shape [K * T].
        begin: first row of each expert, shape [E].
        end: one past the last row of each expert, shape [E].
    """

    order: Array
    begin: Array
    end: Array


Body = Callable[[Operands], Operands]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_loop(body: Body, size: int, rows: Rows, operands: Operands, init: Operands) -> Operands:
    """Adds to ``init`` the result of ``body`` on every block of at most ``size`` rows.

    A row that pads a block is a copy of a real one, so that an expert never sees values that are
    not in the data, but has zeros for its choices. What ``body`` returns for that row is dropped;
    only the gradient of the parameters sums over all rows, so a row with zeros for its choices must
    add zero to it. That holds for ``weight * expert(params, x)`` and for all its derivatives.

    Args:
        body: maps one block of operands to what that block adds.
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
    """The tree with None in place of leaves that have no gradient, such as integers."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, tree)


def merge(some: Tree, tree: Tree) -> Tree:
    """``some`` with its None leaves filled from ``tree``: undoes ``differentiable``."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, tree, is_leaf=lambda a: a is None)


def _run(body: Body, size: int, rows: Rows, operands: Operands, init: Operands) -> Operands:
    """The loop itself. Under ``vmap`` it runs once per example, each with its own trip count."""
    blocks = (jnp.maximum(rows.end - rows.begin, 0) + size - 1) // size  # [E]
    last = jnp.cumsum(blocks)  # [E]: blocks of the experts up to and including this one

    def run(rows: Rows, last: Array, operands: Operands, init: Operands) -> Operands:
        def step(index: Array, total: Operands) -> Operands:
            expert = jnp.searchsorted(last, index, side="right").astype(jnp.int32)
            before = jnp.where(expert > 0, last[expert - 1], 0)
            first = rows.begin[expert] + (index - before) * size
            row = first + jnp.arange(size, dtype=jnp.int32)  # [B]
            choice = rows.order[jnp.minimum(row, rows.end[expert] - 1)]
            inside = row < rows.end[expert]
            return _add(
                total, expert, choice, inside, body(_take(operands, expert, choice, inside))
            )

        return jax.lax.fori_loop(jnp.zeros((), last.dtype), last[-1], step, init)

    return sequential_vmap(run)(rows, last, operands, init)


def _take(operands: Operands, expert: Array, choice: Array, inside: Array) -> Operands:
    """One block of every operand; ``choice`` and ``inside`` have shape [B]."""
    params, tokens, choices, shared = operands

    def of_expert(a: Array) -> Array:
        # A gather: XLA spreads it over threads, and a dynamic slice not.
        return a.at[expert[None]].get(mode="promise_in_bounds")[0]

    def token_rows(a: Array) -> Array:
        return a.at[choice % a.shape[0]].get(mode="promise_in_bounds")

    def choice_rows(a: Array) -> Array:
        kept = inside.reshape(inside.shape + (1,) * (a.ndim - 1))
        return jnp.where(kept, a.at[choice].get(mode="promise_in_bounds"), jnp.zeros((), a.dtype))

    return Operands(
        jax.tree.map(of_expert, params),
        jax.tree.map(token_rows, tokens),
        jax.tree.map(choice_rows, choices),
        shared,
    )


def _add(total: Operands, expert: Array, choice: Array, inside: Array, block: Operands) -> Operands:
    """Adds one block to the totals, in place; padded rows are dropped."""

    def to_expert(a: Array, entry: Array) -> Array:
        # A scatter to one expert would go element by element.
        entry += jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(a, entry, expert, 0)

    def to_tokens(a: Array, rows: Array) -> Array:
        return a.at[jnp.where(inside, choice % a.shape[0], a.shape[0])].add(rows, mode="drop")

    def to_choices(a: Array, rows: Array) -> Array:
        return a.at[jnp.where(inside, choice, a.shape[0])].add(rows, mode="drop")

    return Operands(
        jax.tree.map(to_expert, total.params, block.params),
        jax.tree.map(to_tokens, total.tokens, block.tokens),
        jax.tree.map(to_choices, total.choices, block.choices),
        jax.tree.map(jnp.add, total.shared, block.shared),
    )
