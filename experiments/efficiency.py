"""What four heads cost: latency and memory by batch size, beside what they compute and hold.

    python experiments/efficiency.py
    python experiments/efficiency.py --seeds 3 --batches 1 128 --out runs/efficiency_small

A dense head, a blend of eight experts, and the best two and the best one of eight classify random
features. Heads take turns, and every turn is one seed. A table shows microseconds per image with
their interval, the memory that the compiled program takes, operations and parameters; a picture and
summary.json go to --out. A run that was killed goes on with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse

from parts.command_line import at_least
from parts.records import cores, processor
from studies import efficiency_report
from studies.blocks import Cell
from studies.command import Study, main, seeds_option
from studies.efficiency_measures import turn_of
from studies.efficiency_report import cell_name
from studies.heads import HIDDEN
from studies.identity import identity_of
from studies.sharpness_models import FEATURES, HEADS

BATCHES = (1, 128, 10_000)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 10)
    parser.add_argument(
        "--batches",
        type=at_least(1),
        nargs="+",
        default=list(BATCHES),
        metavar="N",
        help="images per call (default: 1, 128 and 10,000)",
    )


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every head with every batch, a turn at a time."""
    return [
        Cell(cell_name(name, batch), args.seeds, 1, turn_of(head, batch))
        for batch in sorted(set(args.batches))
        for name, head in HEADS.items()
    ]


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The least bytes, by option: features, and the hidden units of the dense head."""
    return {"--batches": 4 * max(args.batches) * (FEATURES + HIDDEN)}


def identity(args: argparse.Namespace) -> dict[str, str]:
    """The options, and the machine: its times are not another's."""
    return identity_of(args) | {"the machine": f"{cores()} cores of {processor()}"}


STUDY = Study(
    "efficiency",
    add_options,
    cells,
    efficiency_report.summarize,
    efficiency_report.render,
    efficiency_report.draw,
    identity,
    memory,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
