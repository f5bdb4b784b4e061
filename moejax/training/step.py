"""A state, and one update of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.base import Array, Params
from moejax.training.update import updated

Metrics = dict[str, Array]
Loss = Callable[[Params, Any, Array | None], tuple[Array, Metrics]]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """Everything that a run needs to go on.

    Attributes:
        params: the model's parameters.
        opt_state: the optimizer's state.
        step: how many updates were made, int32 scalar.
        key: the run's PRNG key. It never changes: what is random in a step or an epoch is derived
            from it and the number of that step or epoch.

    Example:
        >>> state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
        >>> int(state.step), state.params["w"].shape
        (0, (3,))
    """

    params: Params
    opt_state: optax.OptState
    step: Array
    key: Array


def init_state(params: Params, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step.

    Args:
        params: initial parameters.
        optimizer: an optax optimizer.
        key: the run's PRNG key, for the order of examples and the noise of routers.

    Returns:
        A state at step zero.

    Example:
        >>> state = init_state({"w": jnp.zeros(3)}, optax.sgd(0.1), jax.random.key(0))
        >>> int(state.step)
        0
    """
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def train_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """One update, ``(state, batch) -> (state, metrics)``; pure, ready for jit, scan and vmap.

    Args:
        loss: ``(params, batch, key) -> (loss, metrics)``.
        optimizer: an optax optimizer; one that asks for the loss, as ``value``, gets it.

    Returns:
        The step. Its metrics are the loss's, taken before the update, and ``"loss"`` itself.

    Raises:
        ValueError: in the step, if a metric of the loss is called ``"loss"``.

    Example:
        >>> loss = lambda params, x, key: (jnp.sum((params - x) ** 2), {})
        >>> step = jax.jit(train_step(loss, optax.sgd(0.5)))
        >>> state = init_state(jnp.zeros(2), optax.sgd(0.5), jax.random.key(0))
        >>> state, metrics = step(state, jnp.ones(2))
        >>> state.params, float(metrics["loss"])
        (Array([1., 1.], dtype=float32), 2.0)
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, batch, step_key(state)
        )
        if "loss" in metrics:
            raise ValueError(
                'No metric may be called "loss", the name of what is minimised, got '
                f"{sorted(metrics)}: rename it."
            )
        updates, opt_state = updated(
            optimizer, gradients, state.opt_state, state.params, value=value
        )
        params = optax.apply_updates(state.params, updates)
        state = TrainState(params, opt_state, state.step + 1, state.key)
        return state, {"loss": value, **metrics}

    return step


def step_key(state: TrainState) -> Array:
    """The key of the step that the state is at."""
    _, noise_key = jax.random.split(state.key)
    return jax.random.fold_in(noise_key, state.step)
