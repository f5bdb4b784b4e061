"""Chen et al. 2022: a router finds the clusters where experts are nonlinear, and there alone.

    python experiments/clusters.py
    python experiments/clusters.py --seeds 10 --single-seeds 10 --resume
    python experiments/clusters.py --seeds 3 --settings 1 --out runs/clusters_small

Four settings of synthetic data with four clusters; in each, a mixture of eight cubic experts, one
of eight linear experts, and a single network of either kind. Tables show test accuracy and dispatch
entropy beside the published values; a picture and summary.json go to --out. A run that was killed
goes on with --resume, and so does one that is to have more seeds.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from functools import partial

from parts.command_line import at_least
from parts.ending import RefusedError
from studies import clusters_report
from studies.blocks import Cell, one_by_one
from studies.clusters_data import PATCHES, SETTINGS, WIDTH
from studies.clusters_models import CUBIC, LINEAR
from studies.clusters_training import Sizes, train_mixture, train_single
from studies.command import MOST_SEEDS, Study, main, seeds_option

BLOCK = 2  # the most seeds that are lost if a run is killed
SINGLE_RATES = {"nonlinear": 1e-2, "linear": 3e-3}
SINGLE_STEPS = 801
KINDS = {"nonlinear": CUBIC, "linear": LINEAR}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 4, " that is a mixture; published are 10")
    add = parser.add_argument
    add(
        "--single-seeds",
        type=at_least(0, MOST_SEEDS),
        default=2,
        help="runs of each network alone, which takes longest (default: %(default)s)",
    )
    add(
        "--settings",
        type=at_least(1, len(SETTINGS)),
        nargs="+",
        default=list(SETTINGS),
        metavar="N",
        help="which of the four (default: all)",
    )
    counts = {
        "--examples": (8, 16000, "to train, and as many to test"),
        "--steps": (1, 501, "of a mixture, at the most"),
        "--single-steps": (1, SINGLE_STEPS, "of one network, at the most"),
    }
    for name, (least, default, text) in counts.items():
        add(name, type=at_least(least), default=default, help=f"{text} (default: %(default)s)")


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every setting with every network; a program serves all settings.

    Raises:
        RefusedError: if there are steps for networks alone, and no such networks.
    """
    if not args.single_seeds and args.single_steps != SINGLE_STEPS:
        raise RefusedError(
            "--single-steps does nothing with --single-seeds 0, which trains no network alone"
        )
    sizes = Sizes(args.examples, args.steps, args.single_steps)
    mixtures = {
        name: one_by_one(partial(train_mixture, kind=kind, sizes=sizes))
        for name, kind in KINDS.items()
    }
    singles = {
        f"single-{name}": one_by_one(
            partial(train_single, rate=SINGLE_RATES[name], kind=kind, sizes=sizes)
        )
        for name, kind in KINDS.items()
    }
    return [
        Cell(f"{number}-{name}", seeds, BLOCK, partial(program, SETTINGS[number]))
        for programs, seeds in ((mixtures, args.seeds), (singles, args.single_seeds))
        for number in sorted(set(args.settings))
        for name, program in programs.items()
        if seeds
    ]


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The least bytes, by option: examples to train and to test."""
    return {"--examples": 4 * 2 * args.examples * PATCHES * WIDTH}


STUDY = Study(
    "clusters",
    add_options,
    cells,
    clusters_report.summarize,
    clusters_report.render,
    clusters_report.draw,
    memory=memory,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
