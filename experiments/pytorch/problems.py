"""The data on which the frameworks are compared, and how much of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from data import Dataset, toy
from data.text import standard_library
from parts.ending import RefusedError
from pytorch.twins import Problem
from pytorch.ways import BATCH_SIZE, IMAGES

CONTEXT = 64  # characters that a prediction can see


class Size(NamedTuple):
    """How much is computed.

    Attributes:
        toy_steps: steps of the toy, full batch.
        steps: the most steps of the other models in the comparison of numbers; an epoch at most.
        seeds: runs of the toy in the comparison of distributions.
        rounds: of the comparison of speed, after the first.
        images: the most images in an epoch.
        windows: windows of text in an epoch of the language model.
        processes: rounds of whole processes.
    """

    toy_steps: int
    steps: int
    seeds: int
    rounds: int
    images: int
    windows: int
    processes: int


FULL = Size(
    toy_steps=500, steps=400, seeds=100, rounds=5, images=60_000, windows=1_600, processes=3
)
QUICK = Size(toy_steps=100, steps=10, seeds=4, rounds=1, images=1_280, windows=160, processes=0)


def problems_of(models: list[str], size: Size, data: Dataset | None) -> dict[str, Problem]:
    """The data of every model that is compared."""
    found: dict[str, Problem] = {}
    if "toy" in models:
        found["toy"] = toy_problem(size.toy_steps)
    if data is not None:
        found |= dict.fromkeys(IMAGES & set(models), digit_problem(data, size))
    if "language" in models:
        found["language"] = text_problem(size)
    return {name: found[name] for name in models}


def toy_problem(steps: int) -> Problem:
    """A thousand points, all of them in every step."""
    points = toy(jax.random.key(0), 1000)
    x, y = (np.asarray(leaf, np.float64) for leaf in points)
    return Problem(x, y, np.tile(np.arange(len(x)), (steps, 1)))


def digit_problem(data: Dataset, size: Size) -> Problem:
    """Flat images, and the shuffled rows of the first batches."""
    images, labels = (leaf[: size.images] for leaf in data.train)
    x = images.reshape(len(images), -1) / 255  # [N, 784]
    return Problem(x, labels.astype(np.int64), batches(len(x), BATCH_SIZE["dense"], size.steps))


def text_problem(size: Size) -> Problem:
    """Windows of Python's standard library, each with the next character of every character."""
    text = standard_library().train.astype(np.int64)
    starts = np.random.default_rng(0).integers(len(text) - CONTEXT, size=(size.windows, 1))
    places = starts + np.arange(CONTEXT)
    order = batches(size.windows, BATCH_SIZE["language"], size.steps)
    return Problem(text[places], text[places + 1], order)


def batches(examples: int, batch_size: int, most: int) -> np.ndarray:
    """The shuffled rows of the first batches of an epoch, all of one size.

    Raises:
        RefusedError: if there are too few examples for one.
    """
    if examples < batch_size:
        raise RefusedError(
            f"the comparison takes batches of {batch_size} examples, and there are {examples}"
        )
    steps = min(most, examples // batch_size)
    order = np.random.default_rng(0).permutation(examples)[: steps * batch_size]
    return order.reshape(steps, batch_size)
