"""The gated sum over choices sorted by expert: one batched pass, and loops over what it leaves.

Read `_forward` from top to bottom; `_backward` is the same path with each step's derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax._arrays import output_dtype, separate_zeros, vary_together
from moejax._calling import hashable, with_matmul
from moejax._checks import check_array, check_outputs
from moejax._sorting import Sorted, sort_by_expert
from moejax.base import Array, Expert, Params
from moejax.schedules._sorted.batched import cotangents, outputs_of_slots
from moejax.schedules._sorted.closing import Apply, closed
from moejax.schedules._sorted.grouped import grouped_sum
from moejax.schedules._sorted.overflow import (
    Operands,
    Rows,
    add_cotangents,
    block_loop,
    differentiable,
)
from moejax.schedules._sorted.policy import Policy, always_batched, worth_batching
from moejax.schedules._sorted.reverse_only import reverse_only
from moejax.schedules._sorted.slots import Slots, assign_slots, combine


class Program(NamedTuple):
    """What is known while tracing.

    Attributes:
        apply: the expert, for one expert's parameters and any of the policy's row counts.
        policy: how choices are divided between the batched pass and the loops.
        shape: shape of the result, [T, ...].
    """

    apply: Apply
    policy: Policy
    shape: tuple[int, ...]


def gated_sum(
    expert: Expert, params: Params, x: Array, experts: Array, weights: Array, policy: Policy
) -> Array:
    """``y_t = sum_k w_tk E_{e_tk}(x_t)``, as the policy says.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        experts: chosen experts in [0, E], E for nowhere, shape [T, K].
        weights: their gates, shape [T, K].
        policy: from `policy_for_dropless` or `policy_for_capacity`.

    Returns:
        The sum, shape [T, ...], in the dtype of x or, if that cannot hold it, in one that can.
    """
    return _compiled(hashable(expert), policy, params, x, experts, weights)


# Under jit even where the caller's code is not, or loops would be compiled anew at every call.
@partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    expert: Expert, policy: Policy, params: Params, x: Array, experts: Array, weights: Array
) -> Array:
    params, x, experts, weights = vary_together((params, x, experts, weights))
    output = output_like(expert, params, x)
    if weights.size == 0:
        return jnp.zeros(output.shape, output.dtype)
    num_experts = policy.num_experts
    choices = sort_by_expert(experts, weights, num_experts)
    params, x, weights = reverse_only((params, x, weights))
    gates = _gates(weights, output)
    if policy.grouped:
        y = grouped_sum(expert, params, x, gates, choices)
    else:
        apply, shared = closed(with_matmul(expert, policy.matmul), params, x, policy)
        slots = assign_slots(choices, weights.shape[0], policy.groups)
        program = Program(apply, policy, output.shape)
        y = _gated_sum(program, Operands(params, x, gates, reverse_only(shared)), slots, choices)
    return y.astype(output.dtype)


def output_like(expert: Expert, params: Params, x: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a mixture."""
    output = jax.eval_shape(lambda p, x: expert(jax.tree.map(lambda a: a[0], p), x), params, x)
    check_array(output)
    check_outputs(output.shape, x.shape[0])
    return jax.ShapeDtypeStruct(output.shape, output_dtype(x, output))


def _gates(weights: Array, output: jax.ShapeDtypeStruct) -> Array:
    """The weights by choice, ``[T, K] -> [K * T]``, in the dtype of the sum, float32 or more."""
    dtype = np.promote_types(output.dtype, np.promote_types(weights.dtype, "f4"))
    return weights.T.astype(dtype).reshape(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_sum(program: Program, operands: Operands, slots: Slots, choices: Sorted) -> Array:
    return _forward(program, operands, slots, choices)[0]


def _forward(
    program: Program, operands: Operands, slots: Slots, choices: Sorted
) -> tuple[Array, Any]:
    apply, policy, _ = program
    y, outputs = _zeros_of_sum(program, operands), None
    if slots.choice.size:
        run = partial(outputs_of_slots, apply, policy)
        outputs = _batched(program, run, slots, operands)
        y = combine(outputs, operands.choices, slots.slot)
    for size, rows in _overflow(policy, slots, choices):
        y = block_loop(partial(_block, apply), size, rows, operands, Operands(tokens=y)).tokens
    return y, (outputs, operands, slots, choices)


def _backward(program: Program, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    apply, policy, _ = program
    outputs, operands, slots, choices = saved
    total = separate_zeros(differentiable(operands), choices.starts[-1])
    if slots.choice.size:
        run = partial(cotangents, apply, policy)
        total = _batched(program, run, slots, operands, outputs, cotangent)
    for size, rows in _overflow(policy, slots, choices):
        given = Operands(tokens=cotangent)
        total = add_cotangents(partial(_block, apply), size, rows, operands, given, total)
    return total, None, None


_gated_sum.defvjp(_forward, _backward)


def _zeros_of_sum(program: Program, operands: Operands) -> Array:
    like = jax.eval_shape(lambda gates: jnp.broadcast_to(gates[0], program.shape), operands.choices)
    return jnp.zeros_like(like)


def _batched(program: Program, run: Any, slots: Slots, *args: Any) -> Any:
    """The batched pass, or zeros where it does not pay and the loops take every choice."""
    if always_batched(program.policy):
        return run(slots, *args)
    run = jax.jit(run, inline=True)  # traced once, for its shapes; the condition reuses it
    shapes = jax.eval_shape(run, slots, *args)
    zeros = lambda *_: jax.tree.map(jnp.zeros_like, shapes)  # noqa: E731
    return jax.lax.cond(worth_batching(slots.filled, slots.slot.size), run, zeros, slots, *args)


def _overflow(policy: Policy, slots: Slots, choices: Sorted) -> Iterator[tuple[int, Rows]]:
    """Rows left by the batched pass: whole blocks of each size; the last size takes the rest."""
    order, starts = choices
    batched = slots.capacity
    if not always_batched(policy):
        batched = jnp.where(worth_batching(slots.filled, slots.slot.size), batched, 0)
    begin, end = starts[:-1] + batched, starts[1:]
    for size in policy.blocks[:-1]:
        middle = begin + jnp.maximum(end - begin, 0) // size * size
        yield size, Rows(order, begin, middle)
        begin = middle
    for size in policy.blocks[-1:]:
        yield size, Rows(order, begin, end)


def _block(apply: Apply, block: Operands) -> Operands:
    """One expert on one block of its tokens: what to add to the result, [B, ...]."""
    y = apply(block.params, block.tokens, block.shared)
    weights = block.choices.reshape(block.choices.shape + (1,) * (y.ndim - 1))
    return Operands(tokens=weights * y.astype(weights.dtype))
