"""A matrix product whose rows are grouped by expert, each group with its own kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from moejax._sorting import Sorted
from moejax.base import Array
from moejax.schedules._sorted.gated_sum import gated_sum
from moejax.schedules._sorted.products import few_rows
from moejax.schedules.dropless import mean_and_blocks


def grouped_matmul(x: Array, kernel: Array, group_sizes: Array) -> Array:
    """Multiplies consecutive groups of rows by one kernel each.

    ``y_i = x_i W_e`` where row i belongs to group e: the first ``group_sizes[0]`` rows to group
    0, the next ``group_sizes[1]`` to group 1, and so on. Rows past the sum of the group sizes
    belong to none and give zeros. This is the contract of ``jax.lax.ragged_dot``, which computes
    it on accelerators; on CPU, where that primitive runs every kernel on every row, the groups
    are computed by one batched product and a loop over the rows of groups larger than the mean.

    Differentiable in reverse mode any number of times, and can be vmapped over any operand.
    Forward mode (``jax.jvp``) raises a TypeError.

    Args:
        x: rows sorted by group, shape [M, D].
        kernel: one matrix per group, shape [E, D, O], in the dtype of x.
        group_sizes: rows per group, integers of sum at most M, shape [E].

    Returns:
        Products, shape [M, O], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit, or if sizes known while tracing are
            negative or sum to more than M. Sizes only known later must fit: rows beyond M
            do not exist and are not computed.

    Example:
        >>> x, kernel = jnp.ones((5, 3)), jnp.ones((2, 3, 4))
        >>> grouped_matmul(x, kernel, jnp.array([1, 3]))[:, 0]
        Array([3., 3., 3., 3., 0.], dtype=float32)
    """
    x, kernel, group_sizes = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(group_sizes)
    _check(x, kernel, group_sizes)
    if 0 in (x.size, kernel.size):
        return jnp.zeros((len(x), kernel.shape[2]), x.dtype)
    return jax.lax.platform_dependent(
        x, kernel, group_sizes.astype(jnp.int32), cpu=batched_and_blocked, default=stock
    )


def batched_and_blocked(x: Array, kernel: Array, group_sizes: Array) -> Array:
    """``grouped_matmul`` by one batched product of the mean size, and blocks for the rest."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), len(x))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    rows = Sorted(jnp.arange(len(x), dtype=jnp.int32), starts)
    ones = jnp.ones((len(x), 1), np.promote_types(x.dtype, np.float32))
    split = mean_and_blocks(len(x), len(kernel))
    return gated_sum(_product, kernel, x, ones, rows, split)


@jax.custom_vjp
def stock(x: Array, kernel: Array, group_sizes: Array) -> Array:
    """``jax.lax.ragged_dot``, which by itself cannot be vmapped over some of its operands."""
    return sequential_vmap(jax.lax.ragged_dot)(x, kernel, group_sizes)


@jax.custom_vjp
def stock_outer(x: Array, y: Array, group_sizes: Array) -> Array:
    """``sum_i x_i y_i^T`` over the rows of each group, ``[M, D] x [M, O] -> [E, D, O]``."""
    rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    product = partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=rows)
    return sequential_vmap(product)(x, y, group_sizes)


def _stock_backward(saved: tuple[Array, Array, Array], y: Array) -> tuple[Array, Array, None]:
    x, kernel, sizes = saved
    return stock(y, kernel.swapaxes(1, 2), sizes), stock_outer(x, y, sizes), None


def _outer_backward(saved: tuple[Array, Array, Array], kernel: Array) -> tuple[Array, Array, None]:
    x, y, sizes = saved
    return stock(y, kernel.swapaxes(1, 2), sizes), stock(x, kernel, sizes), None


stock.defvjp(lambda *operands: (stock(*operands), operands), _stock_backward)
stock_outer.defvjp(lambda *operands: (stock_outer(*operands), operands), _outer_backward)


def _product(kernel: Array, x: Array) -> Array:
    return few_rows(x, kernel)


def _check(x: Array, kernel: Array, group_sizes: Array) -> None:
    shapes = f"x {x.shape}, kernel {kernel.shape} and group_sizes {group_sizes.shape}"
    if (x.ndim, kernel.ndim, group_sizes.ndim) != (2, 3, 1):
        raise ValueError(f"x must be [M, D], kernel [E, D, O] and group_sizes [E], got {shapes}")
    if x.shape[1] != kernel.shape[1] or len(kernel) != len(group_sizes):
        raise ValueError(f"D and E must be the same in x, kernel and group_sizes, got {shapes}")
    if x.dtype != kernel.dtype:
        raise ValueError(f"x and kernel must have one dtype, got {x.dtype} and {kernel.dtype}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes, dtype=np.int64)
        if (sizes < 0).any() or sizes.sum() > len(x):
            raise ValueError(
                f"group_sizes must not be negative, and sum to at most the number of rows "
                f"({len(x)}), got {sizes.tolist()}"
            )
