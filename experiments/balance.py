"""What keeps experts balanced, and what it costs: losses, a bias, expert choice, ReLU.

    python experiments/balance.py
    python experiments/balance.py --seeds 3 --steps 400 --out runs/balance_small

A layer of eight small experts learns MNIST with each method. A table shows the test error beside
how uneven the load is; a picture shows both over training; summary.json goes to --out. A run that
was killed goes on with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from functools import partial

import jax

from parts.command_line import add_data_dir, at_least
from studies import balance_report
from studies.balance_methods import METHODS
from studies.balance_report import cell_name
from studies.balance_training import POINTS, train
from studies.blocks import Cell, one_by_one
from studies.command import Study, main, seeds_option
from studies.images import identity, loaded

BLOCK = 5  # seeds, one after the other: their arrays stay in cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 10)
    add_data_dir(parser)
    parser.add_argument(
        "--steps",
        type=at_least(POINTS),
        default=2000,
        help=f"steps of Adam, cut to a multiple of {POINTS} (default: %(default)s)",
    )


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every method."""
    data = loaded(args.data_dir)
    steps = args.steps - args.steps % POINTS
    train_split, test_split = jax.device_put((data.train, data.test))
    return [
        Cell(
            cell_name(name),
            args.seeds,
            BLOCK,
            partial(program, train_split, test_split),
        )
        for name, method in METHODS.items()
        for program in [one_by_one(partial(train, method=method, steps=steps))]
    ]


STUDY = Study(
    "balance",
    add_options,
    cells,
    balance_report.summarize,
    balance_report.render,
    balance_report.draw,
    identity,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
