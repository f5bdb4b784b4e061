"""Trains a head with its trunk on distorted images, and tests it after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
from data import Split
from parts.compiling import QUICK_TO_COMPILE
from parts.progress import progress
from studies.heads import Head
from studies.trunk import Trunk, distorted

WEIGHT_DECAY = 0.05


class Run(NamedTuple):
    """A run under way.

    Attributes:
        params: of trunk and head.
        statistics: the means and variances of batch normalisation.
        opt_state: of the optimizer.
    """

    params: Any
    statistics: Any
    opt_state: optax.OptState


def classify(
    head: Head, params: Any, statistics: Any, images: jax.Array | np.ndarray, *, training: bool
) -> tuple[jax.Array, Any, Any]:
    """Trunk and head.

    Args:
        head: on the trunk.
        params: of both.
        statistics: of batch normalisation.
        images: uint8 or float32 in [0, 255], shape [N, 28, 28].
        training: whether to normalise by the batch, and to move the statistics.

    Returns:
        Logits [N, 10], the head's decision, and the statistics.
    """
    x, found = Trunk().apply(
        {"params": params["trunk"], "batch_stats": statistics},
        images,
        training,
        mutable=["batch_stats"] if training else [],
    )
    logits, decision = head.layer.apply(params["head"], x)
    return logits, decision, found.get("batch_stats", statistics)


class Training(NamedTuple):
    """How a run goes.

    Attributes:
        head: on the trunk.
        optimizer: of all parameters.
        epochs: how many.
        batch_size: images per step.
    """

    head: Head
    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW, whose rate rises to ``rate`` over a fifth of the steps, and falls to nothing."""
    rise = max(0.2, 1 / steps)  # a step at least, as optax divides by its length
    schedule = optax.cosine_onecycle_schedule(steps, rate, pct_start=rise, final_div_factor=1e3)
    return optax.adamw(schedule, weight_decay=WEIGHT_DECAY)


def start(key: jax.Array, training: Training) -> Run:
    """Before the first step."""
    trunk_key, head_key = jax.random.split(key)
    variables = Trunk().init(trunk_key, jnp.zeros((1, 28, 28)), training=False)
    params = {"trunk": variables["params"], "head": training.head.layer.init(head_key)}
    return Run(params, variables["batch_stats"], training.optimizer.init(params))


def step(
    training: Training, run: Run, data: Split, rows: jax.Array, key: jax.Array
) -> tuple[Run, jax.Array]:
    """One batch, distorted at random.

    Args:
        training: how the run goes.
        run: before the step.
        data: all images to learn from.
        rows: those of the batch, [B].
        key: of the distortion.

    Returns:
        The run after it, and its mean cross-entropy.
    """
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    images = distorted(key, batch.images)

    def objective(params: Any) -> tuple[jax.Array, Any]:
        logits, decision, statistics = classify(
            training.head, params, run.statistics, images, training=True
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss + training.head.balance(decision), (loss, statistics)

    gradient, (loss, statistics) = jax.grad(objective, has_aux=True)(run.params)
    updates, opt_state = training.optimizer.update(gradient, run.opt_state, run.params)
    return Run(optax.apply_updates(run.params, updates), statistics, opt_state), loss


def evaluate(training: Training, run: Run, test: Split) -> dict[str, jax.Array]:
    """All test images in one batch.

    Returns:
        ``accuracy`` in percent, and of a sparse head the ``load`` of every expert, its share of the
        choices, [E].
    """
    logits, decision, _ = classify(
        training.head, run.params, run.statistics, test.images, training=False
    )
    right = jnp.argmax(logits, axis=-1) == test.labels
    load = {} if training.head.active == 1 else {"load": moejax.expert_load(decision)}
    return {"accuracy": 100 * right.mean(), **load}


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
        ``keys -> measures``, one row per key: by epoch the mean ``loss`` of its steps, and all of
        `evaluate`.
    """
    begin = jax.jit(partial(start, training=training), compiler_options=QUICK_TO_COMPILE)
    look = jax.jit(partial(evaluate, training))

    @partial(jax.jit, donate_argnums=0)
    def go_on(
        run: Run, data: Split, order: jax.Array, keys: jax.Array, place: np.int32
    ) -> tuple[Run, jax.Array]:
        return step(training, run, data, order[place], keys[place])

    def epoch(run: Run, key: jax.Array) -> tuple[Run, np.ndarray]:
        order_key, run_key = jax.random.split(key)
        steps = len(data.labels) // training.batch_size
        order = jax.random.permutation(order_key, len(data.labels))
        order = order[: steps * training.batch_size].reshape(steps, -1)
        keys, losses = jax.random.split(run_key, steps), []
        for place in range(steps):
            run, loss = go_on(run, data, order, keys, np.int32(place))
            losses.append(loss)
        return run, np.mean(jax.device_get(losses))

    def one(key: jax.Array) -> dict[str, Any]:
        init_key, run_key = jax.random.split(key)
        run, found = begin(init_key), []
        keys = jax.random.split(run_key, training.epochs)
        for epoch_key in progress(keys, f"epochs of {name}"):
            run, loss = epoch(run, epoch_key)
            found.append({"loss": loss, **jax.device_get(look(run, test))})
        return stacked(found)

    return lambda keys: stacked([one(key) for key in keys])


def stacked(measures: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *measures)
