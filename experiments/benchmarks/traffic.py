"""What a training step on a mesh sends, read from the compiled program, next to the least possible.

    python experiments/communication.py

One top-k layer of gated units on fake CPU devices; nothing is run. Tokens per device stay the
same while the mesh grows, so a flat column means that a step takes no longer on more devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh

import moejax
from benchmarks.collectives import bytes_sent
from moejax.sharding import expert_parallel, shardings, token_sharding, tokenwise
from moejax.training import TrainState, init_state, train_step
from parts.command_line import OneLineParser, at_least, say

SHAPES = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 8), (2, 4), (8, 1))
BYTES = 4  # float32


class Sizes(NamedTuple):
    """Of the layer and its batch: T is tokens per device."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int


def program(sizes: Sizes, mesh: Mesh, *, exchange: bool) -> jax.stages.Compiled:
    """A compiled training step, with the exchange or with what XLA's partitioner does alone."""
    route: Callable[..., Any] = partial(moejax.top_k, k=sizes.top_k)
    layer = moejax.moe(
        moejax.glu(sizes.width, sizes.hidden),
        moejax.linear(sizes.width, sizes.experts, bias=False),
        num_experts=sizes.experts,
        route=tokenwise(route, mesh) if exchange else route,
        execute=expert_parallel(mesh) if exchange else moejax.dense,
    )

    def loss(params: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, dict]:
        y, routing = layer.apply(params, x)
        return jnp.mean(y**2) + 0.01 * moejax.load_balancing_loss(routing), {}

    optimizer = optax.adam(1e-3)

    def start() -> TrainState:
        return init_state(layer.init(jax.random.key(0)), optimizer, jax.random.key(1))

    state = jax.eval_shape(start)
    where = shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        where,
    )
    batch = jax.ShapeDtypeStruct(
        (sizes.tokens * mesh.size, sizes.width), jnp.float32, sharding=token_sharding(mesh)
    )
    step = jax.jit(train_step(loss, optimizer), out_shardings=(where, None))
    return step.lower(state, batch).compile()


def least_exchange(sizes: Sizes, shards: int) -> float:
    """Bytes of the rows whose expert lives elsewhere: there and back, forward and backward.

    With balanced routing; x needs no gradient in a model of one layer, which saves one journey.
    """
    return 3 * sizes.tokens * sizes.top_k * (shards - 1) / shards * sizes.width * BYTES


def least_gradients(sizes: Sizes, data: int, shards: int) -> float:
    """Bytes of summing the gradients of the router everywhere and of experts along ``data``."""

    def all_reduce(numbers: float, devices: int) -> float:
        return 2 * (devices - 1) / devices * numbers * BYTES

    experts = 3 * sizes.width * sizes.hidden * sizes.experts / shards
    return all_reduce(sizes.width * sizes.experts, data * shards) + all_reduce(experts, data)


def main() -> None:
    """Prints a line per mesh."""
    parser = OneLineParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = partial(parser.add_argument, type=at_least(1))
    for name, default in Sizes(4096, 512, 1024, 8, 2)._asdict().items():
        add(f"--{name.replace('_', '-')}", default=default)
    sizes = Sizes(**vars(parser.parse_args()))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    say("MB sent by every device in one step (least possible)")
    say("data x expert       exchange         gradients      more       total   XLA alone")
    for data, shards in SHAPES:
        axes = ("data", "expert")
        devices = jax.devices()[: data * shards]
        mesh = jax.make_mesh((data, shards), axes, axis_types=(AxisType.Auto,) * 2, devices=devices)
        sent = bytes_sent(program(sizes, mesh, exchange=True))
        alone = sum(bytes_sent(program(sizes, mesh, exchange=False)).values())
        exchange, gradients = sent.pop("all-to-all", 0), sent.pop("all-reduce", 0)
        least = least_exchange(sizes, shards), least_gradients(sizes, data, shards)
        more = sum(sent.values())
        total = exchange + gradients + more
        say(
            f"{data:4d} x {shards:<6d} {exchange / 1e6:8.2f} ({least[0] / 1e6:6.2f}) "
            f"{gradients / 1e6:8.2f} ({least[1] / 1e6:6.2f}) {more / 1e6:9.2f} "
            f"{total / 1e6:11.2f} {alone / 1e6:11.2f}"
        )


if __name__ == "__main__":
    main()
