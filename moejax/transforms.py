"""Small changes to what a router reads or returns: each wraps any router, for any rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.types import Array, Layer, Params, accepts, is_number


def jittered(router: Layer, *, epsilon: float) -> Layer:
    """A router that reads ``x u`` with u uniform in ``[1 - epsilon, 1 + epsilon]``.

    Only the router reads it: the experts get x itself. Without a key there is no jitter.

    Args:
        router: ``x [T, D] -> logits``.
        epsilon: half the width of the factor's range, such as 1e-2.

    Returns:
        A layer with the router's params and ``apply(params, x, *, key=None)``.

    Raises:
        ValueError: if epsilon is not between 0 and 1: the factor could change the sign of x.

    Example:
        >>> router = jittered(moejax.linear(4, 3), epsilon=1e-2)
        >>> params = router.init(jax.random.key(0))
        >>> router.apply(params, jnp.ones((2, 4)), key=jax.random.key(1)).shape
        (2, 3)

    References:
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"`epsilon` must be between 0 and 1, got {epsilon}.")

    def apply(params: Params, x: Array, *, key: Array | None = None) -> Any:
        if key is None:
            return router.apply(params, x)
        jitter_key, router_key = jax.random.split(key)
        u = jax.random.uniform(jitter_key, x.shape, x.dtype, 1 - epsilon, 1 + epsilon)
        return router.apply(params, x * u, **only_accepted(router, key=router_key))

    return Layer(router.init, apply)


def tempered(router: Layer, *, temperature: Array | float) -> Layer:
    """A router with ``logits / temperature``: below 1 sharper, above 1 softer.

    Args:
        router: ``x [T, D] -> logits``; of several values only the first is divided.
        temperature: positive; a traced one may be annealed or learned.

    Returns:
        A layer with the router's params.

    Raises:
        ValueError: if the temperature is a number that is not positive.

    Example:
        >>> router = moejax.Layer(lambda key: {}, lambda params, x: x)
        >>> tempered(router, temperature=2.0).apply({}, jnp.array([[1.0, 3.0]]))
        Array([[0.5, 1.5]], dtype=float32)
    """
    _check_positive("temperature", temperature)
    return _with_logits(router, lambda logits: logits / jnp.asarray(temperature, logits.dtype))


def soft_capped(router: Layer, *, cap: Array | float) -> Layer:
    """A router with ``cap tanh(logits / cap)``: within ``±cap``, the same near zero.

    Args:
        router: ``x [T, D] -> logits``; of several values only the first is capped.
        cap: the bound, positive, such as 30.

    Returns:
        A layer with the router's params.

    Raises:
        ValueError: if the cap is a number that is not positive.

    Example:
        >>> router = moejax.Layer(lambda key: {}, lambda params, x: x)
        >>> soft_capped(router, cap=30.0).apply({}, jnp.array([[1e4, -1e4]]))
        Array([[ 30., -30.]], dtype=float32)

    References:
        Gemma Team, `Gemma 2 <https://arxiv.org/abs/2408.00118>`_, 2024
    """
    _check_positive("cap", cap)

    def bounded(logits: Array) -> Array:
        bound = jnp.asarray(cap, logits.dtype)
        return bound * jnp.tanh(logits / bound)

    return _with_logits(router, bounded)


def _check_positive(name: str, value: Array | float) -> None:
    # Numbers alone: what an array holds is not known while it is traced.
    if is_number(value) and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")


def _with_logits(router: Layer, transform: Callable[[Array], Array]) -> Layer:
    def apply(params: Params, x: Array, *, key: Array | None = None) -> Any:
        outputs = router.apply(params, x, **only_accepted(router, key=key))
        if isinstance(outputs, tuple):
            return (transform(outputs[0]), *outputs[1:])
        return transform(outputs)

    return Layer(router.init, apply)


def only_accepted(router: Layer, *, key: Array | None) -> dict[str, Array | None]:
    """The key as a keyword argument for a router that takes one, and nothing for another."""
    return {"key": key} if accepts(router.apply, "key") else {}
