"""Which examples a step sees: the order of an epoch, cut into batches."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.base import Array
from moejax.training.step import TrainState


class Masked(NamedTuple):
    """Data for a loss that reads a mask, so that all batches of an epoch have one size.

    The last batch of an epoch has N mod B examples, and compiling a second step for it takes as
    long as compiling the first. A loss that takes ``Masked`` batches needs no second step: the last
    batch is filled up with other examples, for which the mask is False. ``mask`` can also leave
    out examples of the data, and then a batch may have none that counts.

    Attributes:
        data: pytree of arrays [N, ...]; in a batch, [B, ...].
        mask: True for examples that count, bool [N]; in a batch, [B].

    Example:
        >>> from moejax.training import init_state, train_epoch, train_step
        >>> def loss(p, batch, key):
        ...     squares = jnp.where(batch.mask[:, None], (p[None] - batch.data) ** 2, 0.0)
        ...     return jnp.sum(squares) / jnp.maximum(jnp.sum(batch.mask, dtype=float), 1), {}
        >>> step = train_step(loss, optax.sgd(0.1))
        >>> state = init_state(jnp.zeros(1), optax.sgd(0.1), jax.random.key(0))
        >>> data = Masked(jnp.ones((5, 1)), jnp.ones(5, bool))
        >>> state, metrics = train_epoch(step, state, data, batch_size=2)
        >>> metrics["loss"].shape
        (3,)
    """

    data: Any
    mask: Array


def epoch_order(state: TrainState, epoch: Array | int, num_examples: int) -> Array:
    """The shuffled order of the examples in an epoch: a function of the run's key and the epoch.

    Args:
        state: the run's state; only its key is read.
        epoch: number of the epoch, from zero.
        num_examples: N, how many there are.

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


def batch_sizes(num_examples: int, batch_size: int) -> tuple[int, ...]:
    """How many examples each step of an epoch sees.

    Args:
        num_examples: N, how many there are.
        batch_size: B, at most N.

    Returns:
        One size per step; all are B except perhaps the last.

    Raises:
        ValueError: if the batch size is not an integer between 1 and N.

    Example:
        >>> batch_sizes(5, 2)
        (2, 2, 1)
    """
    if not (isinstance(batch_size, Integral) and 1 <= batch_size <= num_examples):
        raise ValueError(
            "`batch_size` must be an integer between 1 and the number of examples "
            f"({num_examples}), got {batch_size}."
        )
    rest = num_examples % batch_size
    return (batch_size,) * (num_examples // batch_size) + ((rest,) if rest else ())


def rows_of_steps(order: Array, batch_size: int) -> tuple[Array, Array]:
    """Cuts an order into batches of one size, the last filled up from the beginning of the order.

    Args:
        order: of the examples, [N].
        batch_size: B, at most N.

    Returns:
        The examples of each step [S, B], and whether they are that step's own, bool [S, B].
    """
    steps = -(-len(order) // batch_size)
    positions = jnp.arange(steps * batch_size).reshape(steps, batch_size)
    return order[positions % len(order)], positions < len(order)


def take_rows(data: Any, rows: Array, present: Array) -> Any:
    """The batch of these rows; if the data has a mask, rows that are not present do not count."""
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    return batch._replace(mask=batch.mask & present) if isinstance(data, Masked) else batch


def examples(data: Any) -> tuple[Any, int]:
    """The data as JAX arrays (a tracer cannot index NumPy's), and N.

    Raises:
        ValueError: if the arrays do not share axis 0, or the mask is not a bool for each example.
    """
    data = jax.tree.map(jnp.asarray, data)
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    # A gather clamps the indices: with a shorter array it would give wrong pairs of rows.
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            "The data must be a pytree of arrays [N, ...] with one N, the number of examples, got "
            f"shapes {[list(shape) for shape in shapes]}."
        )
    if isinstance(data, Masked) and (data.mask.ndim != 1 or data.mask.dtype != bool):
        raise ValueError(
            "The mask of the data must be bool [N], True for examples that count, got "
            f"{data.mask.dtype}{list(data.mask.shape)}."
        )
    return data, shapes[0][0]
