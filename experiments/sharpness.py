"""Rokah et al. 2026: is the minimum that a soft mixture finds sharper than that of one network?

    python experiments/sharpness.py
    python experiments/sharpness.py --heads dense soft --seeds 3 --out runs/sharpness_small

Four heads of equal size on a small convolutional trunk learn MNIST. Where training ends, Lanczos
gives the largest eigenvalue of the Hessian and its spectral density, Hutchinson's estimator the
trace, on training and on test images. Tables show them beside the published values; a picture and
summary.json go to --out. A run that was killed goes on with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from data import Dataset
from parts.command_line import add_data_dir, at_least, check_epochs, positive_float
from studies import sharpness_figure, sharpness_report
from studies.blocks import Cell, one_by_one
from studies.command import Study, heads_option, main, seeds_option
from studies.heads import HIDDEN
from studies.images import check_batch_size, identity, loaded
from studies.sharpness_models import FEATURES, MODELS
from studies.sharpness_training import Images, Sizes, run


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 3)
    add_data_dir(parser)
    add = parser.add_argument
    heads_option(parser, MODELS)
    counts = {
        "--examples": (1, 30000, "training images, or all if there are fewer"),
        "--epochs": (1, 10, "passes over the training images"),
        "--batch-size": (1, 100, "training images per step"),
        "--images": (1, 1000, "how many training and how many test images the Hessian is taken at"),
        "--starts": (1, 2, "random vectors from which Lanczos starts"),
        "--steps": (2, 20, "steps of Lanczos from each start"),
        "--probes": (2, 30, "random vectors for the trace"),
    }
    for name, (least, default, text) in counts.items():
        add(name, type=at_least(least), default=default, help=f"{text} (default: %(default)s)")
    add(
        "--learning-rate",
        type=positive_float,
        default=2e-3,
        help="the step size of Adam (default: %(default)s)",
    )


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every head, one run after another: each has the machine to itself."""
    images = images_of(args, loaded(args.data_dir))
    sizes = Sizes(
        args.epochs, args.batch_size, args.learning_rate, args.starts, args.steps, args.probes
    )
    return [
        Cell(name, args.seeds, 1, partial(program, images))
        for name, model in MODELS.items()
        if name in args.heads
        for program in [one_by_one(partial(run, model=model, sizes=sizes))]
    ]


def images_of(args: argparse.Namespace, data: Dataset) -> Images:
    """The images of a run, on the device."""
    train = jax.device_put(jax.tree.map(lambda each: each[: args.examples], data.train))
    test = jax.device_put(data.test)
    check_batch_size(args.batch_size, len(train.labels))
    check_epochs(args.epochs, len(train.labels) // args.batch_size)
    count = min(args.images, len(train.labels), len(test.labels))
    measured = jax.tree.map(lambda *both: jnp.stack([each[:count] for each in both]), train, test)
    return Images(train, test, measured)


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The least bytes, by option: a vector of Lanczos for every step, one for every start."""
    parameters = FEATURES * HIDDEN
    return {
        "--steps": 4 * args.steps * (parameters + args.steps),
        "--starts": 4 * args.starts * parameters,
    }


STUDY = Study(
    "sharpness",
    add_options,
    cells,
    sharpness_report.summarize,
    sharpness_report.render,
    sharpness_figure.draw,
    identity,
    memory,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
