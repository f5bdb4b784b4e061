"""The dropless schedule: every choice is computed, at the cost of the choices alone.

Every expert gets the mean load in one batched pass; the rows that exceed it go through a loop
over blocks of one expert each, as many as there are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.blocks import Operands, Rows, add_cotangents, block_loop
from moejax.dispatch import Slots, Sorted, assign_slots, combine, dispatch, sort_by_expert
from moejax.types import Array, Expert, Params, Routing, at_least_float32

BLOCK = 64  # rows per block of the loop


def dropless(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """``y_t = sum_k w_tk E_{e_tk}(x_t)`` over the chosen experts only, dropping nothing."""
    if routing.experts.size == 0:
        return _nothing(expert, params, x)
    weights = at_least_float32(routing.weights).T  # [K, T]
    choices = sort_by_expert(routing.experts, routing.num_experts)
    y = run_sorted(expert, params, x, weights, choices)
    return y.astype(x.dtype)


def run_sorted(expert: Expert, params: Params, x: Array, weights: Array, choices: Sorted) -> Array:
    """The gated sum over choices that are sorted by expert.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        weights: gates, at least float32, shape [K, T].
        choices: the choices sorted by expert.

    Returns:
        The sum in the dtype of the weights, shape [T, ...].
    """
    num_experts = choices.starts.size - 1
    capacity = -(-weights.size // num_experts)
    slots = assign_slots(choices, weights.shape[1], capacity)
    rest = Rows(choices.order, choices.starts[:-1] + capacity, choices.starts[1:])
    return _gated_sum(expert, params, x, weights, slots, rest)


def _nothing(expert: Expert, params: Params, x: Array) -> Array:
    first = jax.tree.map(lambda a: a[0], params)
    shape = jax.eval_shape(expert, first, x).shape
    return jnp.zeros(shape, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_sum(expert: Expert, params: Params, x: Array, weights: Array, slots: Slots, rest: Rows):
    return _gated_sum_forward(expert, params, x, weights, slots, rest)[0]


def _gated_sum_forward(expert, params, x, weights, slots, rest):
    main = partial(_batched, expert, slots=slots)
    y, pullback = jax.vjp(main, params, x, weights)
    operands = Operands(params, x, weights.reshape(-1))
    out = block_loop(partial(_block, expert), BLOCK, rest, operands, Operands(tokens=y))
    return out.tokens, (pullback, operands, rest, weights.shape)


def _gated_sum_backward(expert, saved, cotangent):
    pullback, operands, rest, shape = saved
    dp, dx, dw = pullback(cotangent)
    init = Operands(dp, dx, dw.reshape(-1))
    dp, dx, dw = add_cotangents(
        partial(_block, expert), BLOCK, rest, operands, Operands(tokens=cotangent), init
    )
    return dp, dx, dw.reshape(shape), None, None


_gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _batched(expert: Expert, params: Params, x: Array, weights: Array, slots: Slots) -> Array:
    rows = jax.vmap(expert)(params, dispatch(x, slots))
    return combine(rows, weights, slots)


def _block(expert: Expert, block: Operands) -> Operands:
    y = expert(block.params, block.tokens)
    weights = block.choices.reshape(block.choices.shape + (1,) * (y.ndim - 1))
    return Operands(tokens=weights * y.astype(weights.dtype))
