"""Schedules: ways to compute the one sum ``y_t = sum_e g_te E_e(x_t)``.

`dense` is the definition. Every other schedule is a faster order of the same sum, and agrees with
it in value and in gradient wherever nothing is dropped.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moejax._arrays import along, blend_dtype, gradient_where, output_dtype
from moejax._calling import hashable, with_matmul
from moejax._checks import (
    check_array,
    check_gates,
    check_outputs,
    check_problem,
    takes,
)
from moejax.base import Array, DenseRouting, Expert, Params, Routing
from moejax.schedules._sorted.products import side_by_side


def mixture(expert: Expert, params: Params, x: Array, gates: Array) -> Array:
    r"""The definition of a mixture.

    .. math:: y_t = \sum_e g_{te}\, E_e(x_t)

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        gates: weight of every expert for every token, shape [T, E].

    Returns:
        The blend, shape [T, ...], in the dtype of x or, if that cannot hold it, in one that can.

    Raises:
        ValueError: if the gates are not one for each token and expert, or an expert does not
            return one output per token.

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> gates = jax.nn.softmax(jnp.zeros((5, 4)))
        >>> mixture(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), gates).shape
        (5, 2)
    """
    check_gates(gates, params, x.shape[0])
    return _blend(hashable(expert), params, x, gates)


# Under jit even where the caller's code is not, or operations would be compiled one by one.
@partial(jax.jit, static_argnums=0)
def _blend(expert: Expert, params: Params, x: Array, gates: Array) -> Array:
    expert = with_matmul(expert, side_by_side)
    over_experts = jax.vmap(expert, in_axes=(0, None), axis_size=gates.shape[1])
    outputs = over_experts(params, x)  # [E, T, O]
    check_array(outputs)
    check_outputs(outputs.shape[1:], x.shape[0])
    gates, blended = _promote(gates, outputs)
    y = jnp.einsum("te,et...->t...", gates, blended)
    return y.astype(output_dtype(x, outputs))


@takes(Routing)
def dense(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """Runs every expert on every token and blends: exact for every rule, and never sparse.

    An expert is not given a token that did not choose it, because it may overflow on that token.
    Under a `DenseRouting` every token is read, even one that `mask_tokens` has masked, so all must
    be finite; `moe` makes sure of that.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        routing: the decision.

    Returns:
        The blend, shape [T, ...], in the dtype of x.

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.top_k(jnp.ones((5, 4)), k=2)
        >>> dense(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing).shape
        (5, 2)
    """
    params, x = check_problem(params, x, routing.scores.shape)
    # Without tokens there is nothing to guard, and no token to stand in for another.
    if isinstance(routing, DenseRouting) or x.shape[0] == 0:
        return mixture(expert, params, x, routing.gates)
    return _guarded(hashable(expert), params, x, routing)


@partial(jax.jit, static_argnums=0)
def _guarded(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """The same sum where an expert may overflow on tokens that did not choose it.

    Zero times infinity is not zero, nor is its gradient. So in place of such a token, an expert
    sees the first token that chose it; an expert that nobody chose gets no gradient.
    """
    chosen = routing.chooses.T  # [E, T]
    first = jax.lax.stop_gradient(x[jnp.argmax(chosen, axis=1)])[:, None]  # [E, 1, D]
    own = jnp.where(along(chosen, x.ndim + 1), x[None], first)  # [E, T, D]
    params = gradient_where(chosen.any(axis=1), params)
    outputs = jax.vmap(expert)(params, own)  # [E, T, O]
    check_array(outputs)
    check_outputs(outputs.shape[1:], x.shape[0])
    outputs = jnp.where(along(chosen, outputs.ndim), outputs, 0)
    gates, blended = _promote(routing.gates, outputs)
    y = jnp.einsum("te,et...->t...", gates, blended)
    return y.astype(output_dtype(x, outputs))


def _promote(gates: Array, outputs: Array) -> tuple[Array, Array]:
    dtype = blend_dtype(gates, outputs)
    return gates.astype(dtype), outputs.astype(dtype)
