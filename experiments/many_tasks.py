"""Ma et al. 2018: several gates over one set of experts, for tasks that have little in common.

    python experiments/many_tasks.py
    python experiments/many_tasks.py --seeds 3 --correlations 0.5 1 --out runs/many_tasks_small

Two regressions share their inputs; the cosine of their weights is chosen. A network that both
tasks share, experts behind one gate and experts behind a gate for each task learn both. A table
shows the loss by correlation; a picture and summary.json go to --out. A run that was killed goes on
with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from functools import partial

import jax

from moejax import Layer
from parts.command_line import at_least, positive_float
from studies import many_tasks_report
from studies.blocks import Cell, one_by_one
from studies.command import Study, main, seeds_option
from studies.many_tasks_data import WIDTH
from studies.many_tasks_report import cell_name
from studies.many_tasks_training import MODELS, POINTS, train

BLOCK = 5  # seeds, one after the other: their arrays stay in cache


def cosine(text: str) -> float:
    """An argparse type: numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 10)
    add = parser.add_argument
    add(
        "--correlations",
        type=cosine,
        nargs="+",
        default=[0.0, 0.5, 0.9, 1.0],
        metavar="P",
        help="cosines of the tasks' weights (default: 0, 0.5, 0.9 and 1)",
    )
    add(
        "--steps",
        type=at_least(POINTS),
        default=2000,
        help=f"steps of Adam, cut to a multiple of {POINTS} (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=128,
        help="fresh examples of a step (default: %(default)s)",
    )
    add("--learning-rate", type=positive_float, default=3e-3, help="of Adam (default: %(default)s)")


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every model at every correlation; a program serves all correlations of a model."""
    return [
        Cell(
            cell_name(name, correlation),
            args.seeds,
            BLOCK,
            partial(program, correlation, args.learning_rate),
        )
        for name, model in MODELS.items()
        for program in [over_seeds(model, args.steps // POINTS * POINTS, args.batch_size)]
        for correlation in sorted(set(args.correlations))
    ]


def over_seeds(model: Layer, steps: int, batch_size: int) -> jax.stages.Wrapped:
    """A run for each key."""
    return one_by_one(partial(train, model=model, steps=steps, batch_size=batch_size))


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The least bytes, by option: a key and a loss for every step, and the examples of one."""
    return {"--steps": 12 * args.steps, "--batch-size": 4 * args.batch_size * WIDTH}


STUDY = Study(
    "many_tasks",
    add_options,
    cells,
    many_tasks_report.summarize,
    many_tasks_report.render,
    many_tasks_report.draw,
    memory=memory,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
