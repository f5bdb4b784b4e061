"""For accelerators: the rows sorted by expert once, and one grouped product per layer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moejax._arrays import along
from moejax._calling import with_matmul
from moejax._sorting import Sorted
from moejax.base import Array, Expert, Matmul, Params
from moejax.schedules._sorted.products import ragged_matmul
from moejax.schedules._sorted.slots import combine


def grouped_sum(expert: Expert, params: Params, x: Array, weights: Array, choices: Sorted) -> Array:
    """The gated sum of experts that take ``matmul``, without padding or loops.

    The expert runs once, on the parameters of all experts ``[E, ...]`` and on all rows; its matrix
    product multiplies every row by the kernel of the row's expert.

    Args:
        expert: takes ``matmul``, and uses its parameters in nothing else.
        params: every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        weights: gates by choice, shape [K * T].
        choices: the choices sorted by expert.

    Returns:
        The sum, shape [T, ...], in the dtype of the weights.
    """
    order, starts = choices
    places = jnp.arange(order.size, dtype=jnp.int32)
    kept = places < starts[-1]  # choices that go nowhere stand at the end
    # A choice that goes nowhere gets a copy of a real row: its output is not read, and no gradient
    # passes through it.
    rows = x[jnp.where(kept, order, order[0]) % x.shape[0]]
    rows = jnp.where(along(kept, rows.ndim), rows, jax.lax.stop_gradient(rows))
    product = _grouped_product(jnp.diff(starts), order.size)
    outputs = with_matmul(expert, product)(params, rows)  # [K * T, ...]
    slot = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.where(kept, places, order.size))
    return combine(outputs, weights, slot.reshape(-1, x.shape[0]))


def _grouped_product(sizes: Array, num_rows: int) -> Matmul:
    """``x_i W_e`` for rows i grouped by expert e, ``[K * T, ..., D] x [E, D, O]``."""

    def product(x: Array, kernel: Array) -> Array:
        if x.ndim < 2 or x.shape[0] != num_rows:
            raise ValueError(
                "An expert that takes `matmul` must multiply all its tokens at once, "
                f"[{num_rows}, ..., D], got {list(x.shape)}: leave `matmul` out of its signature."
            )
        each = math.prod(x.shape[1:-1])  # vectors per token
        y = ragged_matmul(x.reshape(-1, x.shape[-1]), kernel, each * sizes)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return product
