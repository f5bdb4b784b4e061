"""Schedules: ways to compute the one sum ``y_t = sum_e g_te E_e(x_t)``.

`dense` is the definition. Every other schedule is a faster order of the same sum, and agrees with
it in value and in gradient wherever nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.experts import check_stacked
from moejax.products import side_by_side, with_product
from moejax.types import Array, Expert, Params, Routing, by_expert, takes


def mixture(expert: Expert, params: Params, x: Array, gates: Array) -> Array:
    """The definition of a mixture, ``y_t = sum_e g_te E_e(x_t)``.

    Args:
        expert: any pure function ``f(params, x [T, ...]) -> [T, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        gates: weight of every expert for every token, shape [T, E].

    Returns:
        The blend, shape [T, ...], in the dtype of x (of the experts' outputs if x holds integers).

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
    _check_gates(gates, params, len(x))
    expert = with_product(expert, side_by_side)
    over_experts = jax.vmap(expert, in_axes=(0, None), axis_size=gates.shape[1])
    outputs = over_experts(params, x)  # [E, T, O]
    check_array(outputs)
    check_outputs(outputs.shape[1:], len(x))
    gates, blended = _promote(gates, outputs)
    y = jnp.einsum("te,et...->t...", gates, blended)
    return y.astype(output_dtype(x, outputs))


@takes(Routing)
def dense(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    """Runs every expert on every token and blends: exact for every rule, and never sparse.

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
    return mixture(expert, params, x, gates_by_expert(routing))


def gates_by_expert(routing: Routing) -> Array:
    """The gates laid out by expert, [T, K] -> [T, E]; zero where an expert was not chosen."""
    return by_expert(routing, routing.weights)


def check_problem(params: Params, x: Array, shape: tuple[int, ...]) -> tuple[Params, Array]:
    """Refuses what a decision ``[T, E]`` is not about: an index beyond the end reads the last.

    Returns:
        The parameters and tokens as JAX's arrays: NumPy's cannot be indexed by traced choices.
    """
    num_tokens, num_experts = shape
    params, x = jax.tree.map(jnp.asarray, (params, x))
    check_stacked(params, num_experts)
    if len(x) != num_tokens:
        raise ValueError(f"`x` must hold the {num_tokens} tokens that were routed, got {len(x)}.")
    return params, x


def check_array(output: Any) -> None:
    """Refuses an expert that returns something besides its output, as a layer of `moe` does."""
    if not hasattr(output, "shape"):
        raise ValueError(
            f"An expert must return one array, got a {type(output).__name__}: give it an apply "
            "such as `lambda params, x: layer.apply(params, x)[0]`."
        )


def check_outputs(shape: tuple[int, ...], num_tokens: int) -> None:
    """Refuses an expert that sums over tokens or leaves some out."""
    if shape[:1] != (num_tokens,):
        raise ValueError(
            f"An expert must return one output per token, [{num_tokens}, ...], got {list(shape)}: "
            "its x is [tokens, ...]."
        )


def output_dtype(x: Array, outputs: Array) -> jnp.dtype:
    """The dtype of a mixture: that of x, or of the outputs if x holds integers."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else outputs.dtype


def _check_gates(gates: Array, params: Params, num_tokens: int) -> None:
    # One gate for all experts would broadcast; params may be empty, and then have no axis E.
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(gates.shape) != 2 or len(gates) != num_tokens or leading - {gates.shape[1:]}:
        raise ValueError(
            f"`gates` must be [T, E] for {num_tokens} tokens and E the leading axis of every leaf "
            f"of the params, got {list(gates.shape)} and leaves {[[*axis] for axis in leading]}."
        )


def _promote(gates: Array, outputs: Array) -> tuple[Array, Array]:
    # bfloat16 outputs are summed in the gates' float32: rounded gates would not sum to one.
    dtype = np.promote_types(gates.dtype, outputs.dtype)
    return gates.astype(dtype), outputs.astype(dtype)
