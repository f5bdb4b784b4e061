"""Memory that a training step takes once and keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.base import Array, Params
from moejax.training.update import updated


class KeptGradients(NamedTuple):
    """The state of an optimizer under `keep_gradients`.

    Attributes:
        inner: the optimizer's own state.
        gradients: the last step's, in the memory to which the next step writes its own.

    Example:
        >>> state = keep_gradients(optax.sgd(0.1)).init(jnp.zeros(2))
        >>> state.gradients
        Array([0., 0.], dtype=float32)
    """

    inner: optax.OptState
    gradients: Params


def keep_gradients(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose state also keeps each step's gradients until the next step.

    A step that donates its state updates parameters and moments in place, but takes new memory
    for the gradients at every call. On CPU the system must then map and clear each of their pages
    again: for 100 MB that takes longer than a small batch. Donated with the state, the memory of
    the last gradients is reused for the next. The numbers do not change.

    The gradients' memory is then also held between steps and during the forward pass, and
    checkpoints of the state contain them. There is nothing to gain without ``donate_argnums``, or
    in a `jax.lax.scan`, which keeps its memory anyway.

    Args:
        optimizer: an optax optimizer; wrap this around everything else, such as `optax.chain`.

    Returns:
        The optimizer, for gradients of the shapes and dtypes of the parameters, as `jax.grad`
        gives them. The last gradients are ``state.gradients``.

    Example:
        >>> from moejax.training import init_state, train_step
        >>> loss = lambda params, x, key: (jnp.sum((params - x) ** 2), {})
        >>> optimizer = keep_gradients(optax.sgd(0.5))
        >>> step = jax.jit(train_step(loss, optimizer), donate_argnums=0)
        >>> state = init_state(jnp.zeros(2), optimizer, jax.random.key(0))
        >>> state, metrics = step(state, jnp.ones(2))
        >>> state.params, state.opt_state.gradients
        (Array([1., 1.], dtype=float32), Array([-2., -2.], dtype=float32))
    """

    def init(params: Params) -> KeptGradients:
        return KeptGradients(optimizer.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: Params, state: KeptGradients, params: Params | None = None, **extra: Any
    ) -> tuple[Params, KeptGradients]:
        gradients = jax.tree.map(_after, gradients, state.gradients)
        updates, own = updated(optimizer, gradients, state.inner, params, **extra)
        return updates, KeptGradients(own, gradients)

    return optax.GradientTransformationExtraArgs(init, update)


def _after(gradient: Array, last: Array) -> Array:
    """The gradient, reading the last one: `jit` drops unread arguments and does not donate them."""
    return jax.lax.optimization_barrier((gradient, last))[0]
