"""Trains a head with its trunk, and tests it after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from data import Split
from parts.compiling import QUICK_TO_COMPILE
from parts.progress import progress
from studies.trunk_testing import accuracy, blended, evaluate, evaluate_all
from studies.trunk_training import Run, Training, faithful_images, start, step


def curves(
    training: Training, data: Split, test: Split, name: str
) -> Callable[[jax.Array], dict[str, Any]]:
    """What a cell measures: one run after the other, each under a progress bar.

    The steps are not scanned: in a loop, XLA computes convolutions on CPU 14 times as slowly.

    Args:
        training: how the runs go.
        data: to learn from.
        test: to test on.
        name: of the cell.

    Returns:
        ``keys -> measures``, one row per key: by epoch the mean ``loss`` of its steps, and on the
        test images ``accuracy`` in percent and the ``load`` of a sparse head; and after the last
        epoch ``blended``, the accuracy over shifts of every image.
    """
    begin = jax.jit(partial(start, training=training), compiler_options=QUICK_TO_COMPILE)
    look = jax.jit(partial(evaluate, training))

    @partial(jax.jit, donate_argnums=0)
    def go_on(
        run: Run,
        data: Split,
        order: jax.Array,
        keys: jax.Array,
        place: np.int32,
        faithful: np.int32,
    ) -> tuple[Run, jax.Array]:
        return step(training, run, data, order[place], keys[place], faithful)

    def epoch(run: Run, key: jax.Array, faithful: np.int32) -> tuple[Run, np.ndarray]:
        order_key, run_key = jax.random.split(key)
        steps = len(data.labels) // training.batch_size
        order = jax.random.permutation(order_key, len(data.labels))
        order = order[: steps * training.batch_size].reshape(steps, -1)
        keys, losses = jax.random.split(run_key, steps), []
        for place in range(steps):
            run, loss = go_on(run, data, order, keys, np.int32(place), faithful)
            losses.append(loss)
        return run, np.mean(jax.device_get(losses))

    def one(key: jax.Array) -> dict[str, Any]:
        init_key, run_key = jax.random.split(key)
        run, found = begin(init_key), []
        keys = jax.random.split(run_key, training.epochs)
        for place, epoch_key in enumerate(progress(keys, f"epochs of {name}")):
            run, loss = epoch(run, epoch_key, faithful_images(training, place))
            tested = evaluate_all(look, run, test.images)
            right = accuracy(tested.pop("log_probabilities"), test.labels)
            found.append({"loss": loss, "accuracy": right, **tested})
        over_shifts = accuracy(blended(look, run, test.images), test.labels)
        return stacked(found) | {"blended": over_shifts}

    return lambda keys: stacked([one(key) for key in keys])


def stacked(measures: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *measures)
