"""A look inside one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from moejax.base import Array
from moejax.training.step import Loss, TrainState, step_key
from moejax.training.update import updated


class ParameterStep(NamedTuple):
    """What one step did to one parameter; value and update add up to the new value.

    Attributes:
        path: its place in the pytree, such as ``experts.layers.0.kernel``.
        value: before the update.
        gradient: of the loss, after backward.
        update: what the optimizer added.

    Example:
        >>> from moejax.training import init_state
        >>> def loss(params, batch, key):
        ...     return (params["w"] * batch).sum(), {}
        >>> state = init_state({"w": jnp.ones(1)}, optax.sgd(0.5), jax.random.key(0))
        >>> [step] = inspect_step(loss, optax.sgd(0.5), state, jnp.array([2.0]))
        >>> step.path, float(step.gradient[0]), float(step.update[0])
        ('w', 2.0, -1.0)
    """

    path: str
    value: Array
    gradient: Array
    update: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.value.shape


def inspect_step(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> list[ParameterStep]:
    """Looks inside one step without taking it.

    Args:
        loss: ``(params, batch, key) -> (loss, metrics)``.
        optimizer: an optax optimizer, which gets what `train_step` gives it.
        state: the state before the step.
        batch: what the step would see.

    Returns:
        One record per parameter, in the order of the pytree.

    Example:
        >>> from moejax.training import init_state
        >>> loss = lambda params, x, key: (jnp.sum(params["w"] * x), {})
        >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.5), jax.random.key(0))
        >>> [record] = inspect_step(loss, optax.sgd(0.5), state, jnp.array([2.0, 4.0]))
        >>> record.path, record.gradient.tolist(), record.update.tolist()
        ('w', [2.0, 4.0], [-1.0, -2.0])
    """
    (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.params, batch, step_key(state)
    )
    updates, _ = updated(optimizer, gradients, state.opt_state, state.params, value=value)
    params, _ = jax.tree.flatten_with_path(state.params)
    leaves = zip(params, jax.tree.leaves(gradients), jax.tree.leaves(updates), strict=True)
    return [
        ParameterStep(_dotted(path), param, gradient, change)
        for (path, param), gradient, change in leaves
    ]


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
