"""Epochs: one loop of steps, from wherever the state is to wherever it should stop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.base import Array
from moejax.training.batches import (
    Masked,
    batch_sizes,
    epoch_order,
    examples,
    rows_of_steps,
    take_rows,
)
from moejax.training.step import Metrics, Step, TrainState


def train_epoch(
    step: Step, state: TrainState, data: Any, *, batch_size: int
) -> tuple[TrainState, Metrics]:
    """Takes every example once, in the order of the epoch that the state is in.

    This is `train_until` with the epoch's order, to the epoch's end; the epoch's number is read
    from the step count. The examples that do not fill a whole batch make one smaller batch at the
    end, as in a PyTorch DataLoader; `Masked` avoids compiling the step a second time for it.

    Args:
        step: from `train_step`.
        state: the state at the start of an epoch.
        data: pytree of arrays [N, ...], or `Masked`.
        batch_size: B, at most N.

    Returns:
        The state after the epoch, and each metric of every step; weight them by `batch_sizes`.

    Raises:
        ValueError: if the batch size is not between 1 and N, if the arrays of the data do not
            share axis 0, or if a step count that is not traced is in the middle of an epoch.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p[None] - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> state, metrics = train_epoch(step, state, jnp.ones((5, 1)), batch_size=2)
        >>> metrics["loss"].shape
        (3,)
    """
    metrics = empty_metrics(step, state, data, batch_size=batch_size)
    data, num_examples = examples(data)
    steps = len(batch_sizes(num_examples, batch_size))
    # With NumPy, because a known state may be used in a function that is traced.
    if not isinstance(state.step, jax.core.Tracer) and np.asarray(state.step) % steps:
        raise ValueError(
            f"`train_epoch` begins with an epoch of {steps} steps, and step {state.step} is inside "
            "of one: finish it with `train_until`, or with the batch size it began with."
        )
    epoch = state.step // steps
    order = epoch_order(state, epoch, num_examples)
    return train_until(
        step, state, metrics, data, order, (epoch + 1) * steps, batch_size=batch_size
    )


def train_until(
    step: Step,
    state: TrainState,
    metrics: Metrics,
    data: Any,
    order: Array,
    stop: Array | int,
    *,
    batch_size: int,
) -> tuple[TrainState, Metrics]:
    """Continues an epoch from the state's step to the step ``stop``.

    The number of steps is not part of the compiled program, so the same program runs every piece,
    and an epoch gives the same bits however it is cut into pieces.

    Args:
        step: from `train_step`.
        state: the state at the start of an epoch or within it.
        metrics: each metric of every step of the epoch, shape [S, ...]; those of the steps taken
            here are filled in. `empty_metrics` makes them.
        data: pytree of arrays [N, ...], or `Masked`.
        order: from `epoch_order`, for the epoch that the state is in.
        stop: the step count to stop at; the epoch's end, if that comes first.
        batch_size: B, at most N.

    Returns:
        The state after the steps, and the metrics.

    Raises:
        ValueError: if the batch size is not between 1 and N, the arrays of the data and the order
            do not share axis 0, or the metrics are of another number of steps.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p[None] - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> data, order = jnp.ones((5, 1)), epoch_order(state, 0, 5)
        >>> metrics = empty_metrics(step, state, data, batch_size=2)
        >>> state, metrics = train_until(step, state, metrics, data, order, 2, batch_size=2)
        >>> int(state.step), (metrics["loss"] > 0).tolist()
        (2, [True, True, False])
    """
    data, num_examples = examples(data)
    order = jnp.asarray(order)
    if order.shape != (num_examples,):
        raise ValueError(
            f"`order` must have one index for each of the {num_examples} examples, got "
            f"{list(order.shape)}: make it with `epoch_order`."
        )
    sizes = batch_sizes(num_examples, batch_size)
    _check_room(metrics, len(sizes))
    rows, present = rows_of_steps(order, batch_size)
    first = state.step // len(sizes) * len(sizes)  # first step of the epoch
    # Only a loss that reads a mask can take a last batch that is filled up.
    smaller = sizes[-1] < batch_size and not isinstance(data, Masked)
    looped = len(sizes) - 1 if smaller else len(sizes)

    def take(
        carry: tuple[TrainState, Metrics], size: int = batch_size
    ) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        at = state.step - first
        state, one = step(state, take_rows(data, rows[at, :size], present[at, :size]))
        return state, jax.tree.map(partial(_written, at), metrics, one)

    carry = jax.lax.while_loop(
        lambda carry: carry[0].step < jnp.minimum(stop, first + looped), take, (state, metrics)
    )
    if not smaller:
        return carry
    at_last = (carry[0].step == first + looped) & (carry[0].step < stop)
    return jax.lax.cond(at_last, partial(take, size=sizes[-1]), lambda carry: carry, carry)


def _check_room(metrics: Metrics, steps: int) -> None:
    """Refuses metrics of another number of steps: a value written beyond the end is lost."""
    for leaf in jax.tree.leaves(metrics):
        if leaf.shape[:1] != (steps,):
            raise ValueError(
                f"`metrics` must have room for the {steps} steps of an epoch, got "
                f"{list(leaf.shape)}: make them with `empty_metrics` and this batch size."
            )


def _written(at: Array, every: Array, new: Array) -> Array:
    """A metric of every step, with the value of step ``at`` filled in."""
    if jnp.shape(new) != every.shape[1:]:
        raise ValueError(
            "A metric must have the same shape for every batch, also for a smaller one at the end: "
            f"got {list(jnp.shape(new))} and {list(every.shape[1:])}. Take its mean over examples."
        )
    return every.at[at].set(new)


def empty_metrics(step: Step, state: TrainState, data: Any, *, batch_size: int) -> Metrics:
    """Room for each metric of every step of an epoch.

    Args:
        step: from `train_step`.
        state: any state.
        data: pytree of arrays [N, ...], or `Masked`.
        batch_size: B, at most N.

    Returns:
        Zeros [S, ...] for each metric, where S is the number of steps.

    Raises:
        ValueError: if the batch size is not between 1 and N, or the arrays of the data do not
            share axis 0.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p[None] - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> empty_metrics(step, state, jnp.ones((5, 1)), batch_size=2)
        {'loss': Array([0., 0., 0.], dtype=float32)}
    """
    data, num_examples = examples(data)
    steps = len(batch_sizes(num_examples, batch_size))
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data
    )
    _, one = jax.eval_shape(step, state, batch)
    # From NumPy, because `jnp.zeros` compiles a program for each shape.
    zeros = jax.tree.map(lambda leaf: np.zeros((steps, *leaf.shape), leaf.dtype), one)
    return jax.device_put(zeros)


def scan_batches(
    step: Step, state: TrainState, data: Any, indices: Array
) -> tuple[TrainState, Metrics]:
    """Takes one step per row of indices that the caller has chosen.

    Use it to replay the batches of another program; `train_epoch` does its own shuffling.

    Args:
        step: from `train_step`.
        state: where to start.
        data: pytree of arrays [N, ...].
        indices: the examples of each batch, integers in [0, N), [S, B].

    Returns:
        The state after S steps, and each metric of every step, shape [S, ...].

    Raises:
        ValueError: if the arrays of the data do not share axis 0, or the indices are not integers
            [S, B] in range, as far as they are not traced.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p[None] - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> batches = jnp.array([[0, 1], [2, 3]])
        >>> state, metrics = scan_batches(step, state, jnp.ones((4, 1)), batches)
        >>> metrics["loss"].shape, int(state.step)
        ((2,), 2)
    """
    data, num_examples = examples(data)
    indices = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    _check_indices(indices, num_examples)

    def body(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
        return step(state, jax.tree.map(lambda leaf: leaf[rows], data))

    return jax.lax.scan(body, state, indices)


def _check_indices(indices: Array, num_examples: int) -> None:
    if indices.ndim != 2 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            "`indices` must be integers [S, B], a row for each step, got "
            f"{indices.dtype}{list(indices.shape)}."
        )
    # A gather would clamp an index that is too large. Traced indices cannot be checked.
    if isinstance(indices, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # known ones may be used in a function that is traced
        least, largest = int(indices.min(initial=0)), int(indices.max(initial=0))
    if least < 0 or largest >= num_examples:
        raise ValueError(
            f"`indices` must be those of the {num_examples} examples, integers in "
            f"[0, {num_examples}), got {least if least < 0 else largest}."
        )
