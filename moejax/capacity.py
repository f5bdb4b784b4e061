"""The capacity schedule: a fixed number of slots per expert, and what does not fit is dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moejax.dispatch import Slots, assign_slots, combine, dispatch, sort_by_expert
from moejax.execution import check_outputs, output_dtype
from moejax.routing import capacity_for
from moejax.types import Array, Expert, Params, Routing


def capacity(expert: Expert, params: Params, x: Array, routing: Routing, *, factor: float) -> Array:
    """Gives every expert the same number of slots, and drops the choices that find none.

    Each expert has ``C = ceil(factor T K / E)`` slots. All first choices are placed before any
    second choice, and earlier tokens before later ones. A dropped choice contributes nothing, and
    the token's other choices keep their weights. With ``factor >= E / K`` nothing is ever dropped.

    Differentiable in reverse mode any number of times; forward mode (``jax.jvp``) raises a
    TypeError.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.
        factor: slots per expert in units of the mean load, positive.

    Returns:
        The blend, shape [T, ...], in the dtype of x (of the experts' outputs if x holds integers).

    Raises:
        ValueError: if ``factor`` is not a positive finite number, or if an expert does not return
            one output per token.

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.top_k(jnp.ones((5, 4)), k=2)
        >>> capacity(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing, factor=1.0).shape
        (5, 2)

    References:
        Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020;
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    size = capacity_for(routing, factor=factor)
    output = output_like(expert, params, x)
    if routing.experts.size == 0:
        return jnp.zeros(output.shape, output.dtype)
    choices = sort_by_expert(routing.experts, routing.num_experts)
    slots = assign_slots(choices, len(routing.experts), size)
    y = run_slots(expert, params, x, gates_for(routing.weights, output), slots)
    return y.astype(output.dtype)


def output_like(expert: Expert, params: Params, x: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a mixture."""
    output = jax.eval_shape(lambda p, x: expert(jax.tree.map(lambda a: a[0], p), x), params, x)
    check_outputs(output.shape, len(x))
    return jax.ShapeDtypeStruct(output.shape, output_dtype(x, output))


def gates_for(weights: Array, output: jax.ShapeDtypeStruct) -> Array:
    """The weights by choice, ``[T, K] -> [K, T]``, in the dtype of the sum: at least float32."""
    return weights.T.astype(np.promote_types(output.dtype, np.promote_types(weights.dtype, "f4")))


def run_slots(expert: Expert, params: Params, x: Array, weights: Array, slots: Slots) -> Array:
    """Every expert on its slots in one batched pass, and the gated sum.

    Args:
        expert: any pure function ``f(params, x [C, ...]) -> [C, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        weights: gates, at least float32, shape [K, T].
        slots: who stands where.

    Returns:
        The sum over the choices that have a slot, in the dtype of the weights, shape [T, ...].
    """
    rows = jax.vmap(expert)(params, dispatch(x, slots))  # [E, C, ...]
    return combine(rows, weights, slots)
