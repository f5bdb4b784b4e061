"""The whole training step beside the peers': forward, backward and Adam, with nothing set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import optax

import moejax
from benchmarks.layers import (
    DROPLESS,
    GROUPED_MM,
    SHAPES,
    layer_contenders,
    sparse_layer,
    torch_contenders,
    torch_is_there,
)
from benchmarks.other_processes import kill_children
from benchmarks.peers import Shape, gathered, torch_step
from benchmarks.timing import BACKWARD, FORWARD, STEP, Contender, Result, measure, planned_bytes
from moejax.training import Loss, init_state, keep_gradients, train_step
from parts.command_line import say
from parts.compiling import compiled
from parts.ending import before_the_end

KEPT, GATHERED = f"{DROPLESS}, keep_gradients", "gathered weights"
PEERS = (GROUPED_MM, GATHERED)
COLUMNS = ((FORWARD, DROPLESS), (BACKWARD, DROPLESS), (STEP, DROPLESS), (STEP, KEPT))
LEARNING_RATE = 1e-3
COPIES = 8  # the most copies of all experts' weights that gathering may take
SMALL = [Shape(T=tokens, D=256, F=512, E=64, K=2) for tokens in (256, 64, 16, 1)]
QUICK = [Shape(T=64, D=32, F=64, E=16, K=2)]


def step_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """A layer of GLU experts with its router, forward, with backward, and in a whole step.

    Each shape has a process of its own, as a training run has: what ran before in a process decides
    where arrays lie, which can double the time.
    """
    shapes = QUICK if quick else [*SHAPES[:3], *SMALL]
    fresh = get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes,
        before_the_end(kill_children),
    ):
        yield from processes.map(partial(measured, rounds=rounds), shapes)


def measured(shape: Shape, rounds: int) -> Result:
    """All contenders at one shape."""
    adam = optax.adam(LEARNING_RATE)
    contenders = [
        *layer_contenders(DROPLESS, shape, moejax.dropless),
        step_contender(DROPLESS, shape, moejax.dropless, adam),
        step_contender(KEPT, shape, moejax.dropless, keep_gradients(adam)),
    ]
    skipped = {}
    if shape.T * shape.K <= COPIES * shape.E:
        contenders += layer_contenders(GATHERED, shape, gathered)
        contenders += [step_contender(GATHERED, shape, gathered, keep_gradients(adam))]
    else:
        skipped[GATHERED] = f"more than {COPIES} copies of all weights"
    peers, missing = torch_contenders(shape)
    contenders += [one for one in peers if one.name == GROUPED_MM]
    if torch_is_there():
        contenders += [torch_step_contender(shape)]
    return Result("step", shape._asdict(), measure(contenders, rounds), skipped | missing)


def step_contender(
    name: str,
    shape: Shape,
    execute: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
) -> Contender:
    """A training step that donates its state, on random tokens."""
    layer = sparse_layer(shape, execute)
    start = lambda: init_state(  # noqa: E731
        layer.init(jax.random.key(0)), optimizer, jax.random.key(2)
    )
    held = [jax.jit(start)()]
    x = jax.random.normal(jax.random.key(1), (shape.T, shape.D))
    step = train_step(mean_square(layer), optimizer)
    program, seconds = compiled(step, held[0], x, donate_argnums=0)

    def run() -> None:
        state, _ = jax.block_until_ready(program(held.pop(), x))
        held.append(state)

    known = {"flops": 3 * shape.flops, "bytes": shape.weight_bytes, **planned_bytes(program)}
    return Contender(name, run, STEP, compile_seconds=seconds, **known)


def mean_square(layer: moejax.Layer) -> Loss:
    """The mean square of what the layer returns."""

    def loss(params: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        del key
        return jnp.mean(layer.apply(params, x)[0] ** 2), {}

    return loss


def torch_step_contender(shape: Shape) -> Contender:
    """The same step of transformers' block and PyTorch's fused Adam."""
    run = torch_step(shape, LEARNING_RATE)
    return Contender(GROUPED_MM, run, STEP, flops=3 * shape.flops, bytes=shape.weight_bytes)


def print_ratios(results: Sequence[Result]) -> None:
    """One table: how many times the rate of the fastest peer, and which peer that is."""
    say("times the rate of the fastest peer (which it is)")
    headings = [mode if name == DROPLESS else "with keep_gradients" for mode, name in COLUMNS]
    say(f"{'':36s}" + "".join(f"{heading:>36s}" for heading in headings))
    for result in results:
        sizes = " ".join(f"{name}={value}" for name, value in result.sizes.items())
        cells = [ratio(result, mode, name) for mode, name in COLUMNS]
        say(f"{sizes:36s}" + "".join(f"{cell:>36s}" for cell in cells))
    say()


def ratio(result: Result, mode: str, name: str) -> str:
    """The fastest peer's time divided by this contender's, and the peer's name."""
    timed = {one["contender"]: one["seconds"] for one in result.records if one["mode"] == mode}
    peers = [peer for peer in PEERS if peer in timed]
    if not peers:
        return "no peer"
    fastest = min(peers, key=lambda peer: timed[peer])
    return f"{timed[fastest] / timed[name]:.2f} ({fastest})"
