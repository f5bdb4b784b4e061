"""Rokah et al. 2026: does a mixture make a better head of a convolutional network?

    python experiments/heads.py
    python experiments/heads.py --seeds 1 --epochs 2 --out runs/heads_small

Four heads of equal size, one network, a soft and two sparse mixtures, each learn MNIST with a
trunk of five convolutions, from images turned, scaled, shifted and bent at random, and at the end
from images as they are, too. Test accuracy and the loads of the experts come after every epoch.
Tables show them beside the published; a picture and summary.json go to --out. A run that was killed
goes on with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse

import jax

import moejax
from parts.command_line import add_data_dir, at_least, check_epochs, positive_float
from parts.routes import nothing
from studies import heads_figure, heads_report
from studies.blocks import Cell
from studies.command import Study, heads_option, main, seeds_option
from studies.heads import heads
from studies.images import check_batch_size, identity, loaded
from studies.trunk import FEATURES
from studies.trunk_curves import curves
from studies.trunk_training import Training, adamw


def of_all(routing: moejax.Routing, undistorted: jax.Array) -> jax.Array:
    """Load balancing at thirty times the weight of Switch Transformers."""
    return 0.3 * moejax.load_balancing_loss(routing)


def of_undistorted(routing: moejax.Routing, undistorted: jax.Array) -> jax.Array:
    """Load balancing at a hundred times that weight, of images like those to be tested.

    As long as all images of a batch are distorted, all of them count.
    """
    counted = undistorted | ~undistorted.any()
    return moejax.load_balancing_loss(moejax.mask_tokens(routing, counted))


HEADS = heads(FEATURES)
BALANCE = {"dense": nothing, "soft": nothing, "top-2": of_all, "top-1": of_undistorted}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 3)
    add_data_dir(parser)
    add = parser.add_argument
    heads_option(parser, HEADS)
    add("--epochs", type=at_least(1), default=15, help="of training (default: %(default)s)")
    add(
        "--batch-size",
        type=at_least(2),
        default=128,
        help="training images per step (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=4e-3,
        help="the highest, of AdamW (default: %(default)s)",
    )


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every head, a run at a time.

    Raises:
        RefusedError: if a batch has more images than there are, or the run too many steps.
    """
    data = loaded(args.data_dir)
    train = jax.device_put(data.train)
    check_batch_size(args.batch_size, len(train.labels))
    steps_per_epoch = len(train.labels) // args.batch_size
    check_epochs(args.epochs, steps_per_epoch)
    optimizer = adamw(args.learning_rate, args.epochs * steps_per_epoch)
    return [
        Cell(name, args.seeds, 1, curves(training, train, data.test, name))
        for name, head in HEADS.items()
        if name in args.heads
        for training in [Training(head, optimizer, args.epochs, args.batch_size, BALANCE[name])]
    ]


STUDY = Study(
    "heads",
    add_options,
    cells,
    heads_report.summarize,
    heads_report.render,
    heads_figure.draw,
    identity,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
