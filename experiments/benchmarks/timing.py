"""Timing in turns: each contender once per round, with the machine's limits in the same rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.other_processes import busy_elsewhere, page_faults, processor_seconds
from parts.compiling import compiled

SIDE = 2048  # of the product whose rate is the limit
READ = 2**26  # numbers whose sum shows how fast memory is read: 256 MiB
TURN = 0.02  # the least seconds of a turn; short contenders run several times in it
PATIENCE = 4.0  # seconds after which a contender has taken part in enough rounds
FORWARD, BACKWARD, STEP = "forward", "with backward", "whole step"


class Contender(NamedTuple):
    """Something to time.

    Attributes:
        name: who it is.
        run: computes it once and waits for the result.
        mode: what is computed, where there is more than one thing to compute.
        flops: operations that the problem takes, counting matrix products only.
        bytes: how many bytes of parameters have to be read.
        runs: how many runs one call makes; times are given for one of them.
        compile_seconds: how long compilation took, if it is known.
        temporary_bytes: what XLA plans to take besides inputs and outputs, if it is known.
        peak_bytes: the same with inputs and outputs.
    """

    name: str
    run: Callable[[], Any]
    mode: str = ""
    flops: int = 0
    bytes: int = 0
    runs: int = 1
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None


class Result(NamedTuple):
    """The results of one problem.

    Attributes:
        suite: the suite's name.
        sizes: what the problem is.
        records: one per contender.
        skipped: why a peer is not among them.
    """

    suite: str
    sizes: dict[str, Any]
    records: list[dict[str, Any]]
    skipped: dict[str, str]


def jax_contender(
    name: str, function: Callable[..., Any], args: Sequence[Any], **known: Any
) -> Contender:
    """A compiled function with its arguments, and the memory that XLA plans for it."""
    program, seconds = compiled(function, *args)
    run = lambda: jax.block_until_ready(program(*args))  # noqa: E731
    return Contender(name, run, compile_seconds=seconds, **planned_bytes(program), **known)


def planned_bytes(program: jax.stages.Compiled) -> dict[str, Any]:
    """The memory that XLA plans for a program, as a contender states it."""
    memory: Any = program.memory_analysis()
    own = memory.temp_size_in_bytes
    peak = own + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {"temporary_bytes": own, "peak_bytes": peak}


def both_modes(
    name: str, function: Callable[..., jax.Array], args: Sequence[Any], *, flops: int, **known: Any
) -> list[Contender]:
    """A function forward, and with the gradients of all arguments, which triples the products."""
    forward = jax_contender(name, function, args, mode=FORWARD, flops=flops, **known)
    both = forward_and_backward(function)
    return [forward, jax_contender(name, both, args, mode=BACKWARD, flops=3 * flops, **known)]


def forward_and_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value and the gradients of all arguments, for a cotangent of ones."""

    def both(*args: Any) -> Any:
        y, pullback = jax.vjp(function, *args)
        return y, pullback(jnp.ones_like(y))

    return both


def limits() -> list[Contender]:
    """The rate of a large float32 product, and the rate at which memory is read."""
    square = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    return [
        jax_contender("product of 2048", jnp.matmul, (square, square), flops=2 * SIDE**3),
        jax_contender("reading 256 MiB", jnp.sum, (jnp.ones(READ),), bytes=4 * READ),
    ]


def measure(contenders: Sequence[Contender], rounds: int) -> list[dict[str, Any]]:
    """One record per contender, the limits first: medians over the rounds after a warm-up."""
    everyone = [*limits(), *contenders]
    calls = [_calls_per_turn(one) for one in everyone]
    before = processor_seconds()
    seconds: list[list[float]] = [[] for _ in everyone]
    faults: list[list[float]] = [[] for _ in everyone]
    orders = random.Random(0)
    for _ in range(rounds):
        # In another order each time: whoever follows a contender that fills the cache is slower.
        for index in orders.sample(range(len(everyone)), len(everyone)):
            if sum(seconds[index]) < PATIENCE:
                turn = _turn(everyone[index], calls[index])
                seconds[index].append(turn.seconds)
                faults[index].append(turn.faults)
    others = busy_elsewhere(before, processor_seconds())
    medians = [statistics.median(times) for times in seconds]
    flop_rate = everyone[0].flops / medians[0]
    byte_rate = everyone[1].bytes / medians[1]
    return [
        {
            "contender": one.name,
            "mode": one.mode,
            "seconds": median / one.runs,
            "rounds": len(times),
            "busy_elsewhere": others,
            "matmul_floor": one.flops / flop_rate,
            "memory_floor": one.bytes / byte_rate,
            "share": one.flops / flop_rate / median,
            "page_faults": statistics.median(turns),
            "compile_seconds": one.compile_seconds,
            "temporary_bytes": one.temporary_bytes,
            "peak_bytes": one.peak_bytes,
        }
        for one, median, times, turns in zip(everyone, medians, seconds, faults, strict=True)
    ]


class Turn(NamedTuple):
    """What one call took, on average over the calls of a turn."""

    seconds: float
    faults: float


def _calls_per_turn(one: Contender) -> int:
    """Warms up, and finds how many calls fill a turn."""
    first = _turn(one, 1).seconds
    return max(1, int(TURN / (first if first > 1 else _turn(one, 1).seconds)))


def _turn(one: Contender, calls: int) -> Turn:
    faults, began = page_faults(), time.perf_counter()
    for _ in range(calls):
        one.run()
    return Turn((time.perf_counter() - began) / calls, (page_faults() - faults) / calls)
