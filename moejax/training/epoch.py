"""Epochs: the order of the examples, and scans of the step over batches of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Array
from moejax.training.step import Metrics, Step, TrainState


def epoch_order(state: TrainState, epoch: Array | int, num_examples: int) -> Array:
    """The shuffled order of the examples in an epoch: a function of the run's key and the epoch.

    Args:
        state: the run's state; only its key is read.
        epoch: number of the epoch, from zero.
        num_examples: N.

    Returns:
        A permutation of 0..N-1, int32 [N].

    Example:
        >>> from moejax.training import init_state, train_step
        >>> state = init_state({}, optax.sgd(0.1), jax.random.key(0))
        >>> sorted(epoch_order(state, 0, 4).tolist())
        [0, 1, 2, 3]
    """
    order_key, _ = jax.random.split(state.key)
    return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)


def scan_batches(
    step: Step, state: TrainState, data: Any, indices: Array
) -> tuple[TrainState, Metrics]:
    """Takes one step per row of indices.

    Args:
        step: from `train_step`.
        state: where to start.
        data: pytree of arrays [N, ...].
        indices: the examples of each batch, integers [S, B].

    Returns:
        The state after S steps, and each metric of every step, shape [S, ...].

    Raises:
        ValueError: if the arrays of the data do not share axis 0.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> batches = jnp.array([[0, 1], [2, 3]])
        >>> state, metrics = scan_batches(step, state, jnp.ones((4, 1)), batches)
        >>> metrics["loss"].shape, int(state.step)
        ((2,), 2)
    """
    data, _ = _examples(data)

    def body(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
        return step(state, jax.tree.map(lambda leaf: leaf[rows], data))

    return jax.lax.scan(body, state, indices)


def train_epoch(
    step: Step, state: TrainState, data: Any, *, batch_size: int
) -> tuple[TrainState, Metrics]:
    """Every example once, in the order of the epoch that the state is in.

    The epoch's number is read from the step count. The examples left over by whole batches make
    one smaller batch at the end, as a PyTorch DataLoader has it.

    Args:
        step: from `train_step`.
        state: the state at the start of an epoch.
        data: pytree of arrays [N, ...].
        batch_size: B, at most N.

    Returns:
        The state after the epoch, and each metric of every step; weigh them with `batch_sizes`.

    Raises:
        ValueError: if the batch size is not between 1 and N, or the arrays of the data do not
            share axis 0.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> state, metrics = train_epoch(step, state, jnp.ones((5, 1)), batch_size=2)
        >>> metrics["loss"].shape
        (3,)
    """
    data, num_examples = _examples(data)
    sizes = batch_sizes(num_examples, batch_size)
    order = epoch_order(state, state.step // len(sizes), num_examples)
    whole = num_examples - num_examples % batch_size
    state, metrics = scan_batches(step, state, data, order[:whole].reshape(-1, batch_size))
    if whole == num_examples:
        return state, metrics
    state, last = scan_batches(step, state, data, order[None, whole:])
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, last)


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
    """The part of an epoch from the step that the state is at to another: `train_epoch` in pieces.

    The number of steps is not part of the compiled program, so the same program runs every piece,
    and an epoch gives the same bits in whatever pieces it is run.

    Args:
        step: from `train_step`.
        state: the state at the start of an epoch or within it.
        metrics: each metric of every step of the epoch, shape [S, ...]; those of the steps taken
            here are filled in. `empty_metrics` makes them.
        data: pytree of arrays [N, ...].
        order: from `epoch_order`, for the epoch that the state is in.
        stop: the step count to stop at; at most the epoch's end is reached.
        batch_size: B, at most N.

    Returns:
        The state after the steps, and the metrics.

    Raises:
        ValueError: if the batch size is not between 1 and N, or the arrays of the data and the
            order do not share axis 0.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> data, order = jnp.ones((5, 1)), epoch_order(state, 0, 5)
        >>> metrics = empty_metrics(step, state, data, batch_size=2)
        >>> state, metrics = train_until(step, state, metrics, data, order, 2, batch_size=2)
        >>> int(state.step), (metrics["loss"] > 0).tolist()
        (2, [True, True, False])
    """
    data, num_examples = _examples(data)
    order = jnp.asarray(order)
    if order.shape != (num_examples,):
        raise ValueError(
            f"`order` must have one index for each of the {num_examples} examples, got "
            f"{list(order.shape)}: make it with `epoch_order`."
        )
    sizes = batch_sizes(num_examples, batch_size)
    first = state.step // len(sizes) * len(sizes)  # step of the epoch
    whole = num_examples // batch_size
    batches = order[: whole * batch_size].reshape(whole, batch_size)

    def take(carry: tuple[TrainState, Metrics], rows: Array) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        state_after, one = step(state, jax.tree.map(lambda leaf: leaf[rows], data))
        fill = lambda every, new: every.at[state.step - first].set(new)  # noqa: E731
        return state_after, jax.tree.map(fill, metrics, one)

    carry = jax.lax.while_loop(
        lambda carry: carry[0].step < jnp.minimum(stop, first + whole),
        lambda carry: take(carry, batches[carry[0].step - first]),
        (state, metrics),
    )
    if len(sizes) == whole:
        return carry
    at_last = (carry[0].step == first + whole) & (carry[0].step < stop)
    last = partial(take, rows=order[whole * batch_size :])
    return jax.lax.cond(at_last, last, lambda carry: carry, carry)


def empty_metrics(step: Step, state: TrainState, data: Any, *, batch_size: int) -> Metrics:
    """Room for each metric of every step of an epoch.

    Args:
        step: from `train_step`.
        state: any state.
        data: pytree of arrays [N, ...].
        batch_size: B, at most N.

    Returns:
        Zeros [S, ...] for each metric, where S is the number of steps.

    Raises:
        ValueError: if the batch size is not between 1 and N, or the arrays of the data do not
            share axis 0.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> step = train_step(lambda p, x, key: (jnp.sum((p - x) ** 2), {}), optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> empty_metrics(step, state, jnp.ones((5, 1)), batch_size=2)
        {'loss': Array([0., 0., 0.], dtype=float32)}
    """
    data, num_examples = _examples(data)
    steps = len(batch_sizes(num_examples, batch_size))
    batch = jax.tree.map(lambda leaf: leaf[:batch_size], data)
    _, one = jax.eval_shape(step, state, batch)
    return jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), one)


def batch_sizes(num_examples: int, batch_size: int) -> tuple[int, ...]:
    """How many examples each step of an epoch sees.

    Args:
        num_examples: N.
        batch_size: B, at most N.

    Returns:
        One size per step; all are B but perhaps the last.

    Raises:
        ValueError: if the batch size is not between 1 and N.

    Example:
        >>> batch_sizes(5, 2)
        (2, 2, 1)
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"`batch_size` must be between 1 and the number of examples ({num_examples}), "
            f"got {batch_size}."
        )
    rest = num_examples % batch_size
    return (batch_size,) * (num_examples // batch_size) + ((rest,) if rest else ())


def _examples(data: Any) -> tuple[Any, int]:
    # JAX arrays, also of NumPy's, which no tracer can index; and how many examples they hold.
    data = jax.tree.map(jnp.asarray, data)
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    # A gather clamps the indices: with a shorter array it would give wrong pairs of rows.
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            "The data must be a pytree of arrays [N, ...] with one N, the number of examples, got "
            f"shapes {[list(shape) for shape in shapes]}."
        )
    return data, shapes[0][0]
