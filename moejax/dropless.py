"""The dropless schedule: every choice is computed, at the cost of the choices alone.

Every expert computes the mean load in one batched pass, which is as fast as matrix products get.
The choices beyond it go through loops over blocks of one expert each, with as many trips as there
are blocks. Balanced routing leaves little to the loops, collapsed routing nearly everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.blocks import Operands, Rows, add_cotangents, block_loop, differentiable, merge
from moejax.capacity import gates_for, output_like, run_slots
from moejax.dispatch import Slots, Sorted, assign_slots, sort_by_expert
from moejax.types import Array, Expert, Params, Routing

Apply = Callable[[Params, Array, list[Array]], Array]  # (params, x, what it closes over) -> y


class Plan(NamedTuple):
    """What is known while tracing.

    Attributes:
        apply: the expert, for one expert's parameters and any of the row counts in use.
        sizes: rows per block of each loop.
        shape: shape of the result, [T, ...].
    """

    apply: Apply
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


def dropless(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """Runs every expert on the tokens that chose it, however many, and blends.

    ``y_t = sum_k w_tk E_{e_tk}(x_t)``: equal to `dense` in value and in gradient. Differentiable
    in reverse mode any number of times; forward mode (``jax.jvp``) raises a TypeError.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``, one row at a time: what
            it makes of a token must not depend on the others.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.

    Returns:
        The blend, shape [T, ...], in the dtype of x (of the experts' outputs if x holds integers).

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.top_k(jnp.ones((5, 4)), k=2)
        >>> dropless(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing).shape
        (5, 2)

    References:
        Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022
    """
    choices = sort_by_expert(routing.experts, routing.num_experts)
    return run_sorted(expert, params, x, routing.weights, choices)


def run_sorted(expert: Expert, params: Params, x: Array, weights: Array, choices: Sorted) -> Array:
    """The gated sum over choices that are sorted by expert.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        weights: gates, shape [T, K].
        choices: the choices sorted by expert.

    Returns:
        The sum, shape [T, ...], in the dtype of x (of the outputs if x holds integers).
    """
    output = output_like(expert, params, x)
    if weights.size == 0:
        return jnp.zeros(output.shape, output.dtype)
    num_experts = choices.starts.size - 1
    capacity, sizes = _sizes(weights.size, num_experts)
    apply, shared = _closed(expert, params, x, (capacity, *sizes))
    operands = Operands(params, x, gates_for(weights, output).reshape(-1), shared)
    slots = assign_slots(choices, len(weights), capacity)
    plan = Plan(apply, sizes, output.shape)
    return _gated_sum(plan, operands, slots, choices).astype(output.dtype)


def _sizes(num_choices: int, num_experts: int) -> tuple[int, tuple[int, int]]:
    """Rows per expert in the batched pass, and rows per block of each loop.

    A block copies its expert's parameters, which takes as long as computing about 60 rows,
    whatever the widths: blocks of 64 rows waste least on experts that are just over the mean, and
    large ones keep the pace when nearly all choices are left to the loops. With fewer choices than
    experts there is no batched pass: it would read every expert for a few of them. (Gathering
    the chosen experts' parameters for one batched product was no faster than the loop at 2
    choices, and 4 times slower at 32.)
    """
    # More slots than the mean load leave less to the loops, but cost more than that saves.
    capacity = 0 if num_choices < num_experts else -(-num_choices // num_experts)
    block = min(64, max(8, capacity // 2))
    return capacity, (8 * block, block)


def _closed(
    expert: Expert, params: Params, x: Array, sizes: tuple[int, ...]
) -> tuple[Apply, list[Array]]:
    """Makes arguments of the traced arrays that an expert closes over: they may have gradients."""
    converted = {}
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
    for size in sizes:
        rows = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        converted[size], shared = jax.closure_convert(expert, one, rows)
    return lambda params, x, shared: converted[len(x)](params, x, *shared), shared


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_sum(plan: Plan, operands: Operands, slots: Slots, choices: Sorted) -> Array:
    return _add_rest(plan, operands, slots, choices, _batched(plan, operands, slots))


def _forward(plan: Plan, operands: Operands, slots: Slots, choices: Sorted) -> tuple[Array, Any]:
    def batched(some: Operands) -> Array:
        return _batched(plan, merge(some, operands), slots)

    y, pullback = jax.vjp(batched, differentiable(operands))
    y = _add_rest(plan, operands, slots, choices, y)
    return y, (pullback, operands, slots, choices)


def _backward(plan: Plan, saved: Any, cotangent: Array) -> tuple:
    pullback, operands, slots, choices = saved
    (total,) = pullback(cotangent)
    for size, rows in _rest(slots, choices, plan.sizes):
        body = partial(_block, plan.apply)
        total = add_cotangents(body, size, rows, operands, Operands(tokens=cotangent), total)
    return total, None, None


_gated_sum.defvjp(_forward, _backward)


def _add_rest(plan: Plan, operands: Operands, slots: Slots, choices: Sorted, y: Array) -> Array:
    """Adds to y what the batched pass left."""
    for size, rows in _rest(slots, choices, plan.sizes):
        body = partial(_block, plan.apply)
        y = block_loop(body, size, rows, operands, Operands(tokens=y)).tokens
    return y


def _rest(slots: Slots, choices: Sorted, sizes: tuple[int, ...]) -> Iterator[tuple[int, Rows]]:
    """What the batched pass left, cut into whole blocks of each size but the last."""
    order, starts = choices
    begin, end = starts[:-1] + slots.choice.shape[1], starts[1:]
    for size in sizes[:-1]:
        middle = begin + jnp.maximum(end - begin, 0) // size * size
        yield size, Rows(order, begin, middle)
        begin = middle
    yield sizes[-1], Rows(order, begin, end)


def _batched(plan: Plan, operands: Operands, slots: Slots) -> Array:
    """Every expert on its slots, in one pass: [T, ...]."""
    params, x, weights, shared = operands
    if slots.choice.size == 0:
        return jnp.zeros(plan.shape, weights.dtype)
    weights = weights.reshape(slots.slot.shape)  # [K, T]
    return run_slots(lambda p, x: plan.apply(p, x, shared), params, x, weights, slots)


def _block(apply: Apply, block: Operands) -> Operands:
    """One expert on one block of its tokens: what to add to the result, [B, ...]."""
    y = apply(block.params, block.tokens, block.shared)
    weights = block.choices.reshape(block.choices.shape + (1,) * (y.ndim - 1))
    return Operands(tokens=weights * y.astype(weights.dtype))
