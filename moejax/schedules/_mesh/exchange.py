"""How rows travel between the devices of one mesh axis: padded everywhere, ragged where it runs.

Both keep one layout. Device i has a block of C rows for every device j; afterwards block i of
device j holds them. Only the first ``sent[j]`` rows of a block mean anything, the rest are zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.base import Array
from moejax.schedules._sorted.policy import on_cpu

Exchange = Callable[[Array, Array, Array, str], Array]  # (rows, sent, received, axis) -> rows


def padded_exchange(rows: Array, sent: Array, received: Array, axis: str) -> Array:
    """Sends whole blocks, ``out_j[i] = rows_i[j]``: fixed sizes, on every backend.

    Args:
        rows: one block for each of the S devices of the axis, shape [S, C, ...].
        sent: filled rows of each block, int32 [S]; not read.
        received: the same for the blocks that arrive, int32 [S]; not read.
        axis: the mesh axis. The function must run inside `jax.shard_map`.

    Returns:
        The blocks that arrived, shape [S, C, ...].

    Example:
        >>> mesh = jax.make_mesh((4,), ("expert",))
        >>> spec = jax.P("expert")
        >>> send = jax.shard_map(
        ...     lambda rows: padded_exchange(rows, None, None, "expert"),
        ...     mesh=mesh, in_specs=spec, out_specs=spec)
        >>> rows = jax.device_put(jnp.arange(16.0).reshape(16, 1), jax.NamedSharding(mesh, spec))
        >>> send(rows).addressable_shards[0].data[:, 0].tolist()
        [0.0, 4.0, 8.0, 12.0]
    """
    del sent, received
    return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)


def ragged_exchange(rows: Array, sent: Array, received: Array, axis: str) -> Array:
    """Sends only the rows that are filled: fewer bytes, on GPU and TPU.

    Args:
        rows: one block for each of the S devices of the axis, shape [S, C, ...].
        sent: how many rows of each block to send, int32 [S].
        received: how many rows of each block arrive, int32 [S].
        axis: the mesh axis. The function must run inside `jax.shard_map`.

    Returns:
        The blocks that arrived, padded with zeros, shape [S, C, ...].

    Example:
        >>> exchange = ragged_exchange if jax.default_backend() == "gpu" else padded_exchange
    """
    num_shards, block, *features = rows.shape
    flat = rows.reshape(num_shards * block, *features)  # [S C, ...]
    starts = block * jnp.arange(num_shards, dtype=jnp.int32)
    own = jnp.full_like(starts, block) * jax.lax.axis_index(axis)  # my block, wherever it lands
    arrived = jax.lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), starts, sent, own, received, axis_name=axis
    )
    return arrived.reshape(rows.shape)


def exchange_for(mesh: jax.sharding.Mesh) -> Exchange:
    """The exchange with the fewest bytes that the mesh's devices implement.

    Args:
        mesh: where the rows will travel.

    Returns:
        `ragged_exchange` on GPU and TPU, `padded_exchange` elsewhere.

    Example:
        >>> exchange_for(jax.make_mesh((2,), ("expert",))) is padded_exchange
        True
    """
    return padded_exchange if on_cpu(mesh.devices.flat[0].platform) else ragged_exchange
