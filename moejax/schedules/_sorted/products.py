"""Matrix products that experts are given as their ``matmul``: the same numbers, faster."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moejax.base import Array


@jax.custom_batching.custom_vmap
def side_by_side(x: Array, kernel: Array) -> Array:
    """A matrix product that `vmap` over kernels alone turns into one product with all of them.

    ``x [T, D]`` times ``[E, D, O]`` becomes ``x`` times ``[D, E O]``. The `vmap` of a plain product
    gives each kernel's gradient transposed, and the optimizer then reads it against the grain.
    """
    return jnp.matmul(x, kernel)


@side_by_side.def_vmap
def _(size: int, batched: list[bool], x: Array, kernel: Array) -> tuple[Array, bool]:
    if batched != [False, True]:
        axes = [0 if one else None for one in batched]
        return jax.vmap(jnp.matmul, in_axes=axes)(x, kernel), True
    _, d_in, d_out = kernel.shape
    row = jnp.moveaxis(kernel, 0, 1).reshape(d_in, size * d_out)  # [D, E O]
    y = jnp.matmul(x, row).reshape(*x.shape[:-1], size, d_out)  # [T, E, O]
    return jnp.moveaxis(y, -2, 0), True


def transposing_matmul(x: Array, kernel: Array) -> Array:
    """A matrix product for CPU whose kernel gradient is faster; reverse mode only.

    XLA's fast CPU product cannot take a transposed left operand. The kernel gradient ``x^T g``
    needs one, so x^T is copied first.
    """
    return _transposing(x, kernel) if x.ndim == kernel.ndim == 2 else jnp.matmul(x, kernel)


@jax.custom_vjp
def _transposing(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel)


def _transposing_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, kernel), (x, kernel)


def _transposing_backward(saved: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Without the barrier XLA would fold the transpose into the product again.
    to_kernel = jax.lax.optimization_barrier(x.T) @ y
    return (y @ kernel.T).astype(x.dtype), to_kernel.astype(kernel.dtype)


_transposing.defvjp(_transposing_forward, _transposing_backward)


@jax.custom_vjp
def ragged_matmul(x: Array, kernel: Array, sizes: Array) -> Array:
    """``y_i = x_i W_e`` for rows grouped by e: ``[M, D] x [E, D, O] -> [M, O]``.

    It is ``jax.lax.ragged_dot``, which cannot itself be vmapped over some of its operands.
    """
    return sequential_vmap(jax.lax.ragged_dot)(x, kernel, sizes)


@jax.custom_vjp
def ragged_outer(x: Array, y: Array, sizes: Array) -> Array:
    """``sum_i x_i y_i^T`` over the rows of each group, ``[M, D] x [M, O] -> [E, D, O]``."""
    rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    product = partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=rows)
    return sequential_vmap(product)(x, y, sizes)


def _matmul_backward(saved: tuple[Array, Array, Array], y: Array) -> tuple[Array, Array, None]:
    x, kernel, sizes = saved
    return ragged_matmul(y, kernel.swapaxes(1, 2), sizes), ragged_outer(x, y, sizes), None


def _outer_backward(saved: tuple[Array, Array, Array], kernel: Array) -> tuple[Array, Array, None]:
    x, y, sizes = saved
    return ragged_matmul(y, kernel.swapaxes(1, 2), sizes), ragged_matmul(x, kernel, sizes), None


ragged_matmul.defvjp(lambda *given: (ragged_matmul(*given), given), _matmul_backward)
ragged_outer.defvjp(lambda *given: (ragged_outer(*given), given), _outer_backward)
