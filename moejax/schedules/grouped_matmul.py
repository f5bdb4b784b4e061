"""A matrix product whose rows are grouped by expert, each group with its own kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moejax.base import Array, Matmul
from moejax.schedules._sorted.gated_sum import gated_sum
from moejax.schedules._sorted.policy import on_cpu, policy_for_dropless
from moejax.schedules._sorted.products import ragged_matmul


def grouped_matmul(x: Array, kernel: Array, group_sizes: Array) -> Array:
    r"""Multiplies consecutive groups of rows by one kernel each.

    .. math:: y_i = x_i W_e, \qquad i \text{ in group } e

    The first ``group_sizes[0]`` rows belong to group 0, the next ``group_sizes[1]`` to group 1, and
    so on. Rows past the sum of the group sizes belong to no group and give zeros. This is the
    contract of ``jax.lax.ragged_dot``, which is called on accelerators. On CPU that primitive runs
    every kernel on every row, so there the groups are computed by one batched product and a loop
    over the rows for which it has no room.

    Differentiable in reverse mode any number of times, and can be vmapped over any operand.
    Forward mode (``jax.jvp``) raises a TypeError.

    Args:
        x: rows sorted by group, shape [M, D].
        kernel: one matrix per group, shape [E, D, O], in the dtype of x.
        group_sizes: rows per group, integers that sum to at most M, shape [E].

    Returns:
        Products, shape [M, O], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit, or if sizes known while tracing are
            negative or sum to more than M. Sizes known only at run time must fit: rows beyond M
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
    sizes = group_sizes.astype(jnp.int32)
    if not on_cpu():
        return ragged_matmul(x, kernel, sizes)
    return batched_and_blocked(x, kernel, sizes)


def batched_and_blocked(x: Array, kernel: Array, group_sizes: Array) -> Array:
    """`grouped_matmul` as a mixture whose experts are the kernels, each row with one choice."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(len(x), dtype=ends.dtype)
    experts = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)[:, None]  # [M, 1]
    weights = jnp.ones(experts.shape, np.promote_types(x.dtype, np.float32))
    policy = policy_for_dropless(_product, len(x), len(kernel), 1, platform="cpu")
    return gated_sum(_product, kernel, x, experts, weights, policy)


def _product(kernel: Array, x: Array, *, matmul: Matmul = jnp.matmul) -> Array:
    return matmul(x, kernel)


def _check(x: Array, kernel: Array, group_sizes: Array) -> None:
    shapes = f"x {x.shape}, kernel {kernel.shape} and group_sizes {group_sizes.shape}"
    if (x.ndim, kernel.ndim, group_sizes.ndim) != (2, 3, 1):
        raise ValueError(f"x must be [M, D], kernel [E, D, O] and group_sizes [E], got {shapes}")
    if x.shape[1] != kernel.shape[1] or len(kernel) != len(group_sizes):
        raise ValueError(f"D and E must be the same in x, kernel and group_sizes, got {shapes}")
    if x.dtype != kernel.dtype:
        raise ValueError(f"x and kernel must have one dtype, got {x.dtype} and {kernel.dtype}")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"x and kernel must be floats, got {x.dtype}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes, dtype=np.int64)
        if (sizes < 0).any() or sizes.sum() > len(x):
            raise ValueError(
                f"group_sizes must not be negative, and sum to at most the number of rows "
                f"({len(x)}), got {sizes.tolist()}"
            )
