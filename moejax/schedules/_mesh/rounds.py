"""A mixture on one device of an expert-parallel mesh, as a sum over rounds of an exchange.

The device has T tokens, their K choices, and E/S experts; S is the number of devices along the
experts' axis. Every pair of devices has a block of C rows per round. Round r carries the choices
whose place in the queue for their device lies between r C and (r + 1) C, so nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax._arrays import blend_dtype
from moejax._sorting import sort_by_expert
from moejax.base import Array, Params, Routing
from moejax.schedules._mesh.exchange import Exchange

LocalMixture = Callable[[Params, Array, Routing], Array]
Round = Callable[[Array | int, Params, Array, Array], Array]  # (r, params, x, weights) -> y


class Plan(NamedTuple):
    """Which choices of this device travel where.

    Attributes:
        order: the choices, numbered k T + t, sorted by expert and so by device,
            int32 [T K].
        sent: how many choices go to each expert, int32 [S, E/S].
        received: how many come from each device to each expert here, int32 [S, E/S].
        block: C.
    """

    order: Array
    sent: Array
    received: Array
    block: int

    def places(self, r: Array | int) -> Array:
        """The places in every queue that travel in round r, int32 [C]."""
        return r * self.block + jnp.arange(self.block, dtype=jnp.int32)

    def rows(self, counts: Array, r: Array | int) -> Array:
        """How many rows of every block are filled in round r, int32 [S]."""
        return jnp.clip(counts.sum(axis=-1, dtype=jnp.int32) - r * self.block, 0, self.block)

    @property
    def most_rounds(self) -> int:
        """Rounds needed if every choice here goes to one device."""
        return math.ceil(self.order.size / self.block)


def make_plan(routing: Routing, axis: str, factor: float) -> Plan:
    """Sorts the choices of this device by destination, and tells the others how many will come.

    Args:
        routing: the decision of this device's T tokens among all E experts.
        axis: the experts' mesh axis, of size S.
        factor: C as a multiple of the mean load, T K / S.

    Returns:
        The plan.
    """
    num_shards = jax.lax.axis_size(axis)
    order, starts = sort_by_expert(routing.experts, routing.weights, routing.num_experts)
    sent = jnp.diff(starts).reshape(num_shards, -1)  # [E] -> [S, E/S]
    received = jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=True)
    block = min(math.ceil(factor * order.size / num_shards), order.size)
    return Plan(order, sent, received, block)


def one_round(
    local: LocalMixture,
    exchange: Exchange,
    axis: str,
    plan: Plan,
    r: Array | int,
    params: Params,
    x: Array,
    weights: Array,
) -> Array:
    """The part of the sum that the choices of round r contribute: sent, computed, and sent back.

    Args:
        local: the mixture of this device's own experts, ``(params, rows, routing) -> outputs``.
        exchange: how rows travel.
        axis: the experts' mesh axis.
        plan: from `make_plan`.
        r: the round's number.
        params: of this device's experts, every leaf with a leading axis E/S.
        x: tokens, shape [T, ...].
        weights: gates of the choices, shape [T, K].

    Returns:
        A partial sum, shape [T, ...], in float32 or wider.
    """
    sizes = plan.rows(plan.sent, r), plan.rows(plan.received, r)
    choices = _leaving(plan, r)  # [S, C]
    tokens = jnp.where(choices < weights.size, choices % len(x), len(x))  # T, no token, if empty
    with jax.named_scope("dispatch"):
        rows = x.at[tokens].get(mode="fill", fill_value=0)  # [S, C, ...]
        arrived = exchange(rows, *sizes, axis)
    outputs = local(params, arrived.reshape(choices.size, *x.shape[1:]), _arriving(plan, r))
    with jax.named_scope("combine"):
        outputs = outputs.reshape(*choices.shape, *outputs.shape[1:])  # [S, C, ...]
        returned = exchange(outputs, *sizes[::-1], axis)
        gates = weights.T.reshape(-1).at[choices].get(mode="fill", fill_value=0)  # [S, C]
        return _weighted_sum(gates, returned, tokens, len(x))


def _leaving(plan: Plan, r: Array | int) -> Array:
    """The choices that leave in round r, int32 [S, C]; T K, which is no choice, for empty rows."""
    queues, places = plan.sent.sum(axis=-1, dtype=jnp.int32), plan.places(r)
    starts = jnp.cumsum(queues, dtype=jnp.int32) - queues  # [S]
    index = jnp.where(
        places[None] < queues[:, None], starts[:, None] + places[None], plan.order.size
    )
    return plan.order.at[index].get(mode="fill", fill_value=plan.order.size)


def _arriving(plan: Plan, r: Array | int) -> Routing:
    """The experts of the rows that arrive in round r, as a decision of S C tokens with K = 1."""
    ends = jnp.cumsum(plan.received, axis=-1, dtype=jnp.int32)  # queues are sorted by expert
    find = jax.vmap(partial(jnp.searchsorted, side="right"), in_axes=(0, None))
    experts = find(ends, plan.places(r)).reshape(-1, 1)  # [S, C] -> [S C, 1]; E/S when empty
    weights = jnp.ones(experts.shape, jnp.float32)
    scores = jnp.zeros((len(experts), plan.sent.shape[-1]), jnp.float32)
    return Routing(experts.astype(jnp.int32), weights, scores, scores)


def _weighted_sum(gates: Array, outputs: Array, tokens: Array, num_tokens: int) -> Array:
    dtype = blend_dtype(gates, outputs)
    gates = gates.reshape(*gates.shape, *[1] * (outputs.ndim - 2))  # [S, C, 1...]
    y = jnp.zeros((num_tokens, *outputs.shape[2:]), dtype)
    return y.at[tokens].add(gates.astype(dtype) * outputs.astype(dtype), mode="drop")


def sum_of_rounds(
    step: Round, plan: Plan, axes: tuple[str, ...], params: Params, x: Array, weights: Array
) -> Array:
    """The mixture, ``y = sum_r y_r``, over as many rounds as the fullest queue of the mesh needs.

    Round zero is differentiated like any other function. Further rounds, rare with a balanced
    router, keep nothing for the backward pass, which computes them again.

    Args:
        step: `one_round` of the plan.
        plan: from `make_plan`.
        axes: the axes of the mesh; every device takes the same number of rounds.
        params: of this device's experts.
        x: tokens, shape [T, ...].
        weights: gates of the choices, shape [T, K].

    Returns:
        The blend, shape [T, ...], in float32 or wider.
    """
    y = step(0, params, x, weights)
    if plan.most_rounds == 1:
        return y
    longest = plan.sent.sum(axis=-1, dtype=jnp.int32).max()
    needed = jax.lax.pmax(-(-longest // plan.block), axes)  # rounded up

    def nothing(*_: Array) -> Array:
        return jnp.zeros_like(y)

    def further(*inputs: Array) -> Array:
        @partial(jax.checkpoint, prevent_cse=False)
        def add(total: Array, r: Array) -> tuple[Array, None]:
            return total + jax.lax.cond(r < needed, step, nothing, r, *inputs), None

        rounds = jnp.arange(1, plan.most_rounds, dtype=jnp.int32)
        return jax.lax.scan(add, nothing(), rounds)[0]

    # Without the checkpoint, a step of one round would save zeros for the rounds it did not take.
    @jax.checkpoint
    def rest(*inputs: Array) -> Array:
        return jax.lax.cond(needed > 1, further, nothing, *inputs)

    return y + rest(params, x, weights)
