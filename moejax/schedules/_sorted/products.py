"""Matrix products that experts are given as their ``matmul``: the same numbers, faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moejax._calling import accepts
from moejax.base import Array, Expert, Matmul


def with_product(expert: Callable[..., Array], product: Matmul) -> Expert:
    """The expert with this ``matmul``, if it takes one."""
    if not accepts(expert, "matmul"):
        return expert
    # A pytree, so that `jit` and `checkpoint` around the expert take it as an argument.
    return partial(expert, matmul=jax.tree_util.Partial(product))


@jax.custom_batching.custom_vmap
def side_by_side(x: Array, kernel: Array) -> Array:
    """A matrix product whose `vmap` over kernels alone is one product with all of them.

    ``x [T, D]`` times ``[E, D, O]`` is ``x`` times ``[D, E O]``. Left to itself, `vmap` gives each
    kernel's gradient transposed, and the optimizer then reads it against the grain.
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


def few_rows(x: Array, kernel: Array) -> Array:
    """A matrix product whose kernel has a faster gradient on CPU, in reverse mode alone.

    The gradient ``x^T g`` sums over rows. XLA's fast product on CPU sums along the rows of its
    left operand, and leaves one that is transposed to another: with 128 rows that took up to twice
    as long as making a transposed copy first, and with some thousand rows as long.
    """
    return _few_rows(x, kernel) if x.ndim == kernel.ndim == 2 else jnp.matmul(x, kernel)


@jax.custom_vjp
def _few_rows(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Without the barrier XLA would fold the transpose into the product again.
    copied = lambda x, y: jax.lax.optimization_barrier(x.T) @ y  # noqa: E731
    to_kernel = jax.lax.platform_dependent(x, y, cpu=copied, default=lambda x, y: x.T @ y)
    return (y @ kernel.T).astype(x.dtype), to_kernel.astype(kernel.dtype)


_few_rows.defvjp(_forward, _backward)
