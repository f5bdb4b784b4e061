"""A training step of a head with its trunk, on distorted images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import Split
from studies.distortion import distorted
from studies.heads import Head
from studies.trunk import Trunk

WEIGHT_DECAY = 0.05
FAITHFUL = 1 / 3  # of the epochs, the last: half of every batch is not distorted in them


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
        balance: ``(decision, undistorted) -> scalar``, added to the loss; ``undistorted``,
            booleans [B], says which images of the batch are as they were.
    """

    head: Head
    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int
    balance: Callable[[Any, jax.Array], jax.Array]


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
    training: Training,
    run: Run,
    data: Split,
    rows: jax.Array,
    key: jax.Array,
    faithful: jax.Array | np.int32,
) -> tuple[Run, jax.Array]:
    """One batch, distorted at random.

    Args:
        training: how the run goes.
        run: before the step.
        data: all images to learn from.
        rows: those of the batch, [B].
        key: of the distortion.
        faithful: how many images of the batch, the first, are left as they are.

    Returns:
        The run after it, and its mean cross-entropy.
    """
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    undistorted = jnp.arange(len(rows)) < faithful
    images = jnp.where(undistorted[:, None, None], batch.images, distorted(key, batch.images))

    def objective(params: Any) -> tuple[jax.Array, Any]:
        logits, decision, statistics = classify(
            training.head, params, run.statistics, images, training=True
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss + training.balance(decision, undistorted), (loss, statistics)

    gradient, (loss, statistics) = jax.grad(objective, has_aux=True)(run.params)
    updates, opt_state = training.optimizer.update(gradient, run.opt_state, run.params)
    return Run(optax.apply_updates(run.params, updates), statistics, opt_state), loss


def faithful_images(training: Training, epoch: int) -> np.int32:
    """How many images of a batch are not distorted: half of them in the last epochs.

    Distorted images are softer than those that count in the end, and spread otherwise over experts.
    """
    distorting = training.epochs - round(FAITHFUL * training.epochs)
    return np.int32(0 if epoch < distorting else training.batch_size // 2)
