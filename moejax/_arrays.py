"""Small array functions that several modules share."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax._compiling import compiled

Array = jax.Array


@compiled("num_experts")
def by_expert(experts: Array, values: Array, num_experts: int) -> Array:
    """Values of choices laid out by expert, ``[T, K] -> [T, E]``; zero where there is no choice."""
    if values.ndim != 2:
        raise ValueError(
            "`gates`, `counts` and `chooses` are of one decision, with experts [T, K], got "
            f"{list(values.shape)}: for a stack use jax.vmap(lambda routing: routing.counts)."
        )
    num_choices = values.shape[1]
    if num_choices * num_experts <= 64:
        # XLA fuses comparisons with the operations around them, but not a scatter.
        ids = jnp.arange(num_experts, dtype=experts.dtype)[None]  # [1, E]
        if num_choices > 2:
            same = experts[:, :, None] == ids[None]  # [T, K, E]
            return jnp.where(same, values[:, :, None], 0).sum(axis=1)
        # Two columns run faster than a reduction; many take long to compile.
        columns = [slice(k, k + 1) for k in range(num_choices)]
        laid_out = [jnp.where(experts[:, k] == ids, values[:, k], 0) for k in columns]  # [T, E]
        return reduce(jnp.add, laid_out)

    def of_token(experts: Array, values: Array) -> Array:
        # As an index, a negative id would count from the end; one of E or more is dropped.
        experts = jnp.where(experts < 0, num_experts, experts)
        return jnp.zeros(num_experts, values.dtype).at[experts].add(values, mode="drop")

    # Token by token, so that tokens spread over a mesh stay where they are.
    return jax.vmap(of_token)(experts, values)


@jax.custom_jvp
def normal_cdf(x: Array) -> Array:
    """``P(N(0, 1) < x)``. JAX 0.12 has one whose derivative fails in a checked `shard_map`."""
    return jax.lax.erfc(-x * math.sqrt(0.5)) / 2


normal_cdf.defjvps(lambda tangent, _, x: tangent * jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))


def vary_together(tree: Any) -> Any:
    """Inside a `jax.shard_map`, marks all arrays as varying wherever any of them does.

    A loop's carry must vary over the same axes before and after a step, so what starts as zeros
    made from one operand must vary with all of them.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    falses = [jnp.zeros_like(leaf, bool, shape=()) for leaf in jax.tree.leaves(tree)]
    mark = reduce(jnp.logical_or, falses, jnp.zeros((), bool))
    return jax.tree.map(lambda leaf: jnp.where(mark, jnp.zeros_like(leaf), leaf), tree)


def separate_zeros(like: Any, number: Array) -> Any:
    """Zeros like each leaf, made as ``min(number + i, 0)`` from a number that is never negative.

    The number is known only at run time. XLA would make equal constants once, and copy them for
    every loop that writes to one of them. Zeros that it cannot know to be equal are written where
    the loops need them.
    """
    leaves, structure = jax.tree.flatten(like)
    zeros = [
        jnp.full(leaf.shape, jnp.minimum(number + index, 0).astype(leaf.dtype))
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, zeros)


def along(mask: Array, ndim: int) -> Array:
    """A mask over the leading axes of an array of ``ndim`` axes, ready to broadcast."""
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))


def gradient_where(used: Array, tree: Any) -> Any:
    """The leaves [E, ...] themselves, but gradients reach only the experts that are used [E].

    An expert that nobody chose may overflow on the tokens that it runs on, and an infinite gradient
    times zero is not a number.
    """

    def one(leaf: Array) -> Array:
        kept = used.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(kept, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(one, tree)


def gradient_if(present: Array, tree: Any) -> Any:
    """The leaves themselves, but gradients reach them only if some token is not padding.

    Otherwise zeros stand in for the tokens, and a function may have no derivative at zero.
    """
    return jax.tree.map(lambda leaf: jnp.where(present, leaf, jax.lax.stop_gradient(leaf)), tree)


def at_least_float32(x: Array) -> Array:
    """Promotes bfloat16, float16 and integers to float32; float64 stays float64."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def indices(ids: Array) -> Array:
    """Integers of at least 32 bits: compared with a size, JAX would overflow a narrower index."""
    return ids.astype(jnp.int32) if jnp.iinfo(ids.dtype).bits < 32 else ids


def output_dtype(x: Array, outputs: Array) -> jnp.dtype:
    """The dtype of a mixture: the dtype of x, unless it cannot hold the sum of the outputs.

    Integers cannot hold a weighted sum, nor can real numbers that of complex ones.
    """
    is_complex = jnp.issubdtype(outputs.dtype, jnp.complexfloating)
    if jnp.issubdtype(x.dtype, jnp.floating) and not is_complex:
        return x.dtype
    return outputs.dtype if jnp.issubdtype(outputs.dtype, jnp.inexact) else jnp.dtype("f4")


def blend_dtype(gates: Array, outputs: Array) -> jnp.dtype:
    """The dtype in which gates multiply outputs; bfloat16 gates would not sum to one."""
    if not jnp.issubdtype(outputs.dtype, jnp.inexact):
        return gates.dtype  # NumPy would take float64 for the gates and int32
    return np.promote_types(gates.dtype, outputs.dtype)


def padded_by_example(tokens: Array, mask: Array) -> Array:
    """The tokens [T, ...], with a copy of the first real one in place of every masked one.

    Padding may hold anything, and a function may be undefined at zero. A copy of a token that is
    computed anyway brings no new value and no new gradient.
    """
    if tokens.shape[0] == 0:
        return tokens
    first = mask & (jnp.arange(tokens.shape[0]) == jnp.argmax(mask))
    # A sum, not an index: tokens that are spread over a mesh do not take one.
    example = jnp.where(along(first, tokens.ndim), tokens, 0).sum(axis=0, keepdims=True)
    example = jax.lax.stop_gradient(example.astype(tokens.dtype))  # [1, ...]
    return jnp.where(along(mask, tokens.ndim), tokens, example)


def where_kept(mask: Array, values: Array) -> Array:
    """The values [..., ...] of tokens that are not padding [...], and zeros for the others."""
    return jnp.where(along(mask, values.ndim), values, 0)
