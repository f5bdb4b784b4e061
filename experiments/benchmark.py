"""How fast moejax is: contenders side by side, in turns, on random data.

    python experiments/benchmark.py --out runs/benchmark
    python experiments/benchmark.py --suite layer

Every time is a median after a warm-up. Shares are of the rate of a 2048 x 2048 float32 product,
measured in the same rounds, and count the operations of the active experts only. Faults are pages
of memory that the system had to give anew. PyTorch compiles nothing.

step     a training step of one layer against its peers, and the ratios to the fastest of them
relu     a layer whose tokens choose fewer and fewer experts
toy      one seed of the toy, alone and as one of 100
mnist    an epoch of the MNIST experiment
layer    a sparse layer against its peers, and under collapsed routing
grouped  the product behind it
scaling  the layer for more experts, and for more tokens
load     what mnist.py does before its first epoch and after its last
traffic  bytes that a training step sends between devices, read from the compiled program
"""

from __future__ import annotations

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.layers import grouped_suite, layer_suite, scaling_suite
from benchmarks.report import draw, print_table, print_traffic
from benchmarks.sparsity import relu_suite
from benchmarks.steps import print_ratios, step_suite
from benchmarks.timing import Result
from benchmarks.traffic import traffic_suite
from benchmarks.whole_runs import load_suite, mnist_suite, toy_suite
from parts.command_line import OneLineParser, add_out, say, start_devices
from parts.output import output_of_one_run
from parts.records import cores, processor, rounded, versions, write_json

ROUNDS = 7
SETTINGS = ["GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "OMP_NUM_THREADS"]


class Suite(NamedTuple):
    """Problems, and how their results are shown.

    Attributes:
        run: ``(rounds, quick) -> results``.
        show: prints one result.
        conclude: prints what all results come to.
    """

    run: Callable[[int, bool], Iterator[Result]]
    show: Callable[[Result], None]
    conclude: Callable[[Sequence[Result]], None] = lambda results: None


SUITES = {
    "step": Suite(step_suite, print_table, print_ratios),
    "toy": Suite(toy_suite, print_table),
    "mnist": Suite(mnist_suite, print_table),
    "layer": Suite(layer_suite, print_table),
    "grouped": Suite(grouped_suite, print_table),
    "scaling": Suite(scaling_suite, print_table),
    "relu": Suite(relu_suite, print_table),
    "load": Suite(load_suite, print_table),
    "traffic": Suite(traffic_suite, print_traffic),
}


def main() -> None:
    """Runs the suites, and writes their tables and pictures as they come."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_out(parser, "runs/benchmark")
    parser.add_argument("--quick", action="store_true", help="small problems, to see that it runs")
    parser.add_argument("--suite", choices=SUITES, help="one suite instead of all")
    options = parser.parse_args()
    with ending.one_line_errors(), output_of_one_run(options.out):
        start_devices()
        work(options)


def work(options: argparse.Namespace) -> None:
    """The suites."""
    folder = options.out
    results: list[Result] = []
    settings = "".join(f", {name}={value}" for name, value in environment().items())
    say(f"{cores()} cores of {processor()}{settings}\n")
    for name in [options.suite] if options.suite else SUITES:
        suite = SUITES[name]
        for result in suite.run(2 if options.quick else ROUNDS, options.quick):
            suite.show(result)
            results.append(result)
            write_json(folder / "summary.json", summary(results))
        suite.conclude([result for result in results if result.suite == name])
    pictures = draw(results, folder)
    say(f"{', '.join(['summary.json', *pictures])} in {folder}")


def summary(results: list[Result]) -> dict[str, Any]:
    """All results, with six significant digits for what was measured."""
    return {
        "versions": versions(),
        "environment": environment(),
        "results": [plain(result) for result in results],
    }


def environment() -> dict[str, str]:
    """The settings of the process that change how fast it is."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def plain(result: Result) -> dict[str, Any]:
    """A result without the values that are not known."""
    records = [
        {name: value for name, value in record.items() if value is not None}
        for record in result.records
    ]
    return result._asdict() | {"records": [_rounded(record) for record in records]}


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, str) else rounded(v) for k, v in record.items()}


if __name__ == "__main__":
    main()
