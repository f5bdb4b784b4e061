"""The order in which choices are served: sorted by expert, stably, in integers."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from moejax.base import Array


class Sorted(NamedTuple):
    """The choices sorted by expert; those that go nowhere stand at the end.

    Attributes:
        order: choices in the order of their experts, shape [K * T].
        starts: first position of each expert in ``order``, and the end of the last, shape [E + 1].
    """

    order: Array
    starts: Array


def sort_by_expert(experts: Array, num_experts: int) -> Sorted:
    """Sorts choices by expert, stably, in integers throughout.

    Args:
        experts: expert ids in [0, E], where E means nowhere, shape [T, K].
        num_experts: E.
    """
    ids = experts.T.reshape(-1).astype(jnp.int32)  # [K * T]
    size = ids.size
    if (num_experts + 1) * size < 2**31:
        # Expert and choice in one integer: sorting one array of integers is several times as
        # fast on CPU as a stable sort of pairs.
        keys = jnp.sort(ids * size + jnp.arange(size, dtype=jnp.int32), stable=False)
        order = keys % max(size, 1)
    else:
        order = jnp.argsort(ids, stable=True).astype(jnp.int32)
        keys = ids[order]
        size = 1
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) * size
    return Sorted(order, jnp.searchsorted(keys, bounds).astype(jnp.int32))
