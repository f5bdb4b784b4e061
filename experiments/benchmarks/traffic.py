"""What a training step on a mesh sends, read from the compiled program, next to the least possible.

One top-k layer of gated units on fake CPU devices; nothing is run. Tokens per device stay the
same while the mesh grows, so a flat column means that a step takes no longer on more devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh

import moejax
from benchmarks.collectives import bytes_sent
from benchmarks.other_processes import kill_children
from benchmarks.peers import Shape
from benchmarks.timing import Result
from moejax.sharding import expert_parallel, shardings, token_sharding, tokenwise
from moejax.training import TrainState, init_state, train_step
from parts.ending import before_the_end

DEVICES = 8
MESHES = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 8), (2, 4), (8, 1))  # data x expert
FULL, QUICK = Shape(T=4096, D=512, F=1024, E=8, K=2), Shape(T=32, D=8, F=16, E=8, K=2)
BYTES = 4  # float32


def traffic_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """Bytes that every device sends in one step, on meshes of up to eight devices.

    It runs in a process of its own, because this one has its devices already.
    """
    del rounds  # compiled programs do not vary
    shape, meshes = (QUICK, MESHES[3:5]) if quick else (FULL, MESHES)
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context, initializer=make_devices) as process,
        before_the_end(kill_children),
    ):
        records = list(process.map(partial(sent_on, shape), meshes))
    yield Result("traffic", shape._asdict(), records, {})


def make_devices() -> None:
    """Lets the process have eight devices on CPU."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def sent_on(shape: Shape, sizes: tuple[int, int]) -> dict[str, Any]:
    """What a step sends on a mesh of these sizes, in bytes."""
    data, shards = sizes
    devices = jax.devices()[: data * shards]
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(sizes, ("data", "expert"), axis_types=kinds, devices=devices)
    exchanged = bytes_sent(program(shape, mesh, tokenwise, expert_parallel(mesh)))
    alone = bytes_sent(program(shape, mesh, as_it_is, moejax.dense))
    return {
        "data": data,
        "expert": shards,
        "exchange": exchanged.get("all-to-all", 0),
        "least_exchange": least_exchange(shape, shards),
        "gradients": exchanged.get("all-reduce", 0),
        "least_gradients": least_gradients(shape, data, shards),
        "total": sum(exchanged.values()),
        "partitioner_alone": sum(alone.values()),
    }


def as_it_is(route: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The rule, left to XLA's partitioner."""
    del mesh
    return route


def program(
    shape: Shape,
    mesh: Mesh,
    spread: Callable[[Callable[..., Any], Mesh], Callable[..., Any]],
    execute: Callable[..., jax.Array],
) -> jax.stages.Compiled:
    """A compiled training step of T tokens per device.

    Args:
        shape: of the layer, and its tokens per device.
        mesh: with the axes ``data`` and ``expert``.
        spread: turns the layer's rule into a rule for the mesh.
        execute: the schedule.
    """
    layer = moejax.moe(
        moejax.glu(shape.D, shape.F),
        moejax.linear(shape.D, shape.E, bias=False),
        num_experts=shape.E,
        route=spread(partial(moejax.top_k, k=shape.K), mesh),
        execute=execute,
    )

    def loss(
        params: Any, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, routing = layer.apply(params, x)
        return jnp.mean(y**2) + 0.01 * moejax.load_balancing_loss(routing), {}

    optimizer = optax.adam(1e-3)

    def start() -> TrainState:
        return init_state(layer.init(jax.random.key(0)), optimizer, jax.random.key(1))

    state = jax.eval_shape(start)
    where = shardings(state, mesh)
    placed = jax.tree.map(placed_like, state, where)
    tokens = jax.ShapeDtypeStruct((shape.T * mesh.size, shape.D), jnp.float32)
    step = jax.jit(train_step(loss, optimizer), out_shardings=(where, None))
    return step.lower(placed, placed_like(tokens, token_sharding(mesh))).compile()


def placed_like(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array with its place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def least_exchange(shape: Shape, shards: int) -> float:
    """Bytes of the rows whose expert lives elsewhere: there and back, forward and backward.

    For balanced routing. In a model of one layer x needs no gradient, which saves one journey.
    """
    return 3 * shape.T * shape.K * (shards - 1) / shards * shape.D * BYTES


def least_gradients(shape: Shape, data: int, shards: int) -> float:
    """Bytes of summing the gradients of the router everywhere and of experts along ``data``."""

    def all_reduce(numbers: float, devices: int) -> float:
        return 2 * (devices - 1) / devices * numbers * BYTES

    experts = 3 * shape.D * shape.F * shape.E / shards
    return all_reduce(shape.D * shape.E, data * shards) + all_reduce(experts, data)
