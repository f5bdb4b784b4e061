"""How fast the layer is: contenders side by side, alternating, on random data.

    python experiments/benchmark.py --out runs/benchmark --suite layer

Every time is a median after a warm-up. Shares are of the rate of a 2048 x 2048 float32 product,
measured in the same rounds, and count the operations of the active experts only.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from benchmark_peers import Shape, one_hot, ragged_dot, torch_layers
from common import (
    OneLineParser,
    compiled,
    output_folder,
    rounded,
    say,
    versions,
    write_json,
)

import moejax

SIDE = 2048  # of the product whose rate is the limit
SLOW = 16  # experts from which contenders that compute all of them are left out
QUICK = [Shape(T=256, D=32, F=64, E=4, K=2)]
SHAPES = [
    Shape(T=4096, D=512, F=1024, E=8, K=2),
    Shape(T=4096, D=256, F=512, E=64, K=2),
    Shape(T=4096, D=256, F=512, E=128, K=8),
    Shape(T=16, D=256, F=512, E=64, K=2),
    Shape(T=1, D=256, F=512, E=64, K=2),
]


class Contender(NamedTuple):
    """Something to time: what it computes, its operations, and what its compilation told."""

    name: str
    run: Callable[[], Any]
    flops: int
    compile_seconds: float | None = None
    peak_bytes: int | None = None


def jax_contender(name: str, function: Callable[..., Any], args: tuple, flops: int) -> Contender:
    """A compiled function with its arguments, and the memory XLA plans for it."""
    program, seconds = compiled(function, *args)
    memory = cast(jax.stages.Compiled, program).memory_analysis()
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    peak = sum(getattr(memory, size) for size in sizes)
    return Contender(name, lambda: jax.block_until_ready(program(*args)), flops, seconds, peak)


def forward_and_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value and the gradients of all arguments, for a cotangent of ones."""

    def both(*args: Any) -> Any:
        y, pullback = jax.vjp(function, *args)
        return y, pullback(jnp.ones_like(y))

    return both


def schedules(shape: Shape) -> dict[str, Callable[..., jax.Array]]:
    """The schedules that finish in reasonable time at this size."""
    sparse: dict[str, Callable[..., jax.Array]] = {
        "dropless": moejax.dropless,
        "capacity 1.0": partial(moejax.capacity, factor=1.0),
    }
    every: dict[str, Callable[..., jax.Array]] = {
        "dense": moejax.dense,
        "ragged_dot": ragged_dot,
        "one-hot": one_hot,
    }
    return sparse | (every if shape.E < SLOW else {})


def layer_suite(shape: Shape) -> list[Contender]:
    """A layer of GLU experts with its router, forward and with backward."""
    contenders = []
    for name, execute in schedules(shape).items():
        layer = moejax.moe(
            moejax.glu(shape.D, shape.F),
            moejax.linear(shape.D, shape.E, bias=False),
            num_experts=shape.E,
            route=partial(moejax.top_k, k=shape.K),
            execute=execute,
        )

        def apply(params: Any, x: jax.Array, layer: moejax.Layer = layer) -> jax.Array:
            return layer.apply(params, x)[0]

        args = (layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), shape[:2]))
        both = forward_and_backward(apply)
        contenders += [
            jax_contender(f"{name}, forward", apply, args, shape.flops),
            jax_contender(f"{name}, with backward", both, args, 3 * shape.flops),
        ]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        for name, run in torch_layers(shape).items():
            contenders += [
                Contender(f"{name}, forward", partial(run, False), shape.flops),
                Contender(f"{name}, with backward", partial(run, True), 3 * shape.flops),
            ]
    return contenders


def grouped_suite(shape: Shape) -> list[Contender]:
    """One product with a kernel per group, for random group sizes."""
    rows = shape.T * shape.K
    keys = jax.random.split(jax.random.key(0), 3)
    groups = jax.random.randint(keys[0], (rows,), 0, shape.E)
    sizes = jnp.bincount(groups, length=shape.E).astype(jnp.int32)
    x = jax.random.normal(keys[1], (rows, shape.D))
    kernel = jax.random.normal(keys[2], (shape.E, shape.D, shape.F))
    products: dict[str, Callable[..., jax.Array]] = {"grouped_matmul": moejax.grouped_matmul}
    if shape.E < SLOW:
        products["ragged_dot"] = jax.lax.ragged_dot
    contenders = []
    for name, product in products.items():

        def apply(
            x: jax.Array, kernel: jax.Array, product: Callable[..., jax.Array] = product
        ) -> jax.Array:
            return product(x, kernel, sizes)

        both = forward_and_backward(apply)
        contenders += [
            jax_contender(f"{name}, forward", apply, (x, kernel), shape.flops // 3),
            jax_contender(f"{name}, with backward", both, (x, kernel), shape.flops),
        ]
    return contenders


SUITES = {"layer": layer_suite, "grouped": grouped_suite}


def measure(contenders: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """The contenders in turn, round after round, with the limit in every round."""
    square = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    limit = jax_contender("limit", jnp.matmul, (square, square), 2 * SIDE**3)
    seconds: dict[str, list[float]] = {one.name: [] for one in [limit, *contenders]}
    for round_ in range(rounds + 1):
        for one in [limit, *contenders]:
            start = time.perf_counter()
            one.run()
            if round_:  # the first warms up
                seconds[one.name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rate = limit.flops / medians["limit"]
    return [
        {
            "contender": one.name,
            "seconds": medians[one.name],
            "share": one.flops / medians[one.name] / rate,
            "limit_gflops": rate / 1e9,
            "compile_seconds": one.compile_seconds,
            "peak_bytes": one.peak_bytes,
        }
        for one in [limit, *contenders]
    ]


def report(records: list[dict[str, Any]]) -> None:
    """Prints one table."""
    say(f"{'':34s}{'ms':>10s}{'share':>8s}{'peak MB':>10s}{'compile s':>11s}")
    for record in records:
        peak, build = record["peak_bytes"], record["compile_seconds"]
        say(
            f"{record['contender']:34s}{1e3 * record['seconds']:10.2f}{record['share']:8.0%}"
            f"{'-' if peak is None else f'{peak / 1e6:.0f}':>10s}"
            f"{'-' if build is None else f'{build:.1f}':>11s}"
        )
    say()


def main() -> None:
    """Runs the suites, prints their tables and writes summary.json."""
    parser = OneLineParser(description="Compares speed, memory and compile time.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="a small problem, to see that it runs")
    parser.add_argument("--suite", choices=SUITES, help="one suite instead of all")
    options: argparse.Namespace = parser.parse_args()
    folder = output_folder(parser, options.out)
    rounds, shapes = (1, QUICK) if options.quick else (7, SHAPES)
    results = []
    for suite in [options.suite] if options.suite else SUITES:
        for shape in shapes:
            say(f"{suite}: " + ", ".join(f"{k}={v}" for k, v in shape._asdict().items()))
            records = measure(SUITES[suite](shape), rounds)
            report(records)
            results.append({"suite": suite, "shape": shape._asdict(), "records": records})
    write_json(folder / "summary.json", {"versions": versions(), "results": rounded_all(results)})
    say(f"Wrote {folder / 'summary.json'}")


def rounded_all(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Six significant digits for what was measured."""
    return [
        result
        | {
            "records": [
                {k: v if v is None or isinstance(v, str) else rounded(v) for k, v in one.items()}
                for one in result["records"]
            ]
        }
        for result in results
    ]


if __name__ == "__main__":
    main()
