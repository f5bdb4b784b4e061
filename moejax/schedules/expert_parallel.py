"""The schedule for many devices: experts stay where they live, tokens travel to them and back."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from moejax._arrays import vary_together
from moejax._calling import hashable
from moejax._checks import check_problem, takes
from moejax._comparing import comparable
from moejax.base import Array, Expert, Params, Routing, Schedule
from moejax.schedules._mesh.exchange import Exchange, exchange_for
from moejax.schedules._mesh.rounds import make_plan, one_round, sum_of_rounds
from moejax.schedules._sorted.gated_sum import output_like
from moejax.schedules.dropless import dropless


@comparable
def expert_parallel(
    mesh: Mesh,
    *,
    axis: str = "expert",
    factor: float = 1.25,
    local: Schedule = dropless,
    exchange: Exchange | None = None,
) -> Schedule:
    r"""A schedule that spreads tokens over the whole mesh and experts over one axis.

    The sum is the same on any mesh. Along ``axis`` every pair of devices exchanges C rows per
    round, for T tokens per device and S devices,

    .. math:: C = \lceil \text{factor} \cdot T K / S \rceil

    A balanced router needs one round. Rows that do not fit travel in further rounds, as many as the
    fullest block needs; the backward pass recomputes these. Nothing is ever dropped, and a device
    holds at most ``4 factor T K`` rows in buffers, whatever the router does.

    Args:
        mesh: a mesh with Auto or Explicit axes; every axis but ``axis`` is data parallel.
        axis: the axis along which the experts live; its size S must divide E.
        factor: slots per pair of devices as a multiple of the mean load. Larger means fewer
            further rounds, more memory and, where blocks are padded, more bytes.
        local: the schedule on each device, over its own experts with K = 1.
        exchange: how rows travel; by default what suits the devices of the mesh.

    Returns:
        A schedule, ``(expert, params, x, routing) -> y``, for `moe`'s ``execute``. Arguments are
        global arrays. Params must be sharded over ``axis`` on their leading axis to save memory,
        and x over all axes on its leading axis to save communication; see `shardings` and
        `token_sharding`.

    Raises:
        ValueError: if the mesh has no such axis or the factor is not positive; when the schedule
            is traced, if the tokens do not divide among the devices or the experts along the axis.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "expert"))
        >>> model = moejax.moe(
        ...     moejax.linear(3, 2), moejax.linear(3, 8), num_experts=8,
        ...     route=partial(moejax.top_k, k=2), execute=expert_parallel(mesh))
        >>> params = model.init(jax.random.key(0))
        >>> y, routing = jax.jit(model.apply)(params, jnp.ones((16, 3)))
        >>> y.shape
        (16, 2)

    References:
        Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020
    """
    check_axis(mesh, axis)
    if not 0 < factor < math.inf:
        raise ValueError(f"`factor` must be a positive finite number, got {factor}.")
    way = Way(mesh, axis, factor, local, exchange or exchange_for(mesh))

    @takes(Routing)
    def execute(expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
        params, x = check_problem(params, x, routing.scores.shape)
        check_tokens(mesh, len(x))
        _check_experts(mesh, axis, routing.num_experts)
        return _on_mesh(way, hashable(expert), params, x, routing)

    return execute


class Way(NamedTuple):
    """How the sum is spread over devices: the arguments of `expert_parallel`."""

    mesh: Mesh
    axis: str
    factor: float
    local: Schedule
    exchange: Exchange


# Under jit even where the caller's code is not, or each operation would be compiled for all
# devices.
@partial(jax.jit, static_argnums=(0, 1))
def _on_mesh(way: Way, expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    of_experts, of_tokens = jax.P(way.axis), jax.P(way.mesh.axis_names)
    on_mesh = jax.shard_map(
        partial(_on_device, way, expert),
        mesh=way.mesh,
        in_specs=(of_experts, of_tokens, of_tokens),
        out_specs=of_tokens,
    )
    x, routing = placed((x, routing), way.mesh, of_tokens)
    return on_mesh(placed(params, way.mesh, of_experts), x, routing)


def _on_device(way: Way, expert: Expert, params: Params, x: Array, routing: Routing) -> Array:
    # Once here, or every round would sum the parameters' gradients over the data axes.
    params, x, routing = vary_together((params, x, routing))
    output = output_like(expert, params, x)
    if routing.experts.size == 0:
        return jnp.zeros(output.shape, output.dtype)
    plan = make_plan(routing, way.axis, way.factor)
    step = partial(one_round, partial(way.local, expert), way.exchange, way.axis, plan)
    y = sum_of_rounds(step, plan, way.mesh.axis_names, params, x, routing.weights)
    return y.astype(output.dtype)


def check_axis(mesh: Mesh, axis: str) -> None:
    """Refuses an axis that the mesh does not have."""
    if axis not in mesh.shape:
        raise ValueError(f"`axis` must be one of the mesh's axes {mesh.axis_names}, got {axis!r}.")


def placed(tree: Any, mesh: Mesh, spec: jax.P) -> Any:
    """Moves arrays to where `jax.shard_map` wants them; on Auto axes, it moves them itself."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)), tree)


def check_tokens(mesh: Mesh, num_tokens: int) -> None:
    """Refuses tokens that the devices of the mesh cannot share equally."""
    if num_tokens % mesh.size:
        raise ValueError(
            f"The number of tokens must be a multiple of the mesh's {mesh.size} devices, got "
            f"{num_tokens}: pad the batch and pass a `mask` that is False for the padding."
        )


def _check_experts(mesh: Mesh, axis: str, num_experts: int) -> None:
    if num_experts % mesh.shape[axis]:
        raise ValueError(
            f"The number of experts must be a multiple of the {mesh.shape[axis]} devices along "
            f"{axis!r}, got {num_experts}."
        )
