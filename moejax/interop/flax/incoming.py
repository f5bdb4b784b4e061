"""Flax modules as layers, so that your module can be an expert or a router.

A layer is a pure function of its parameters, so a module with other state (batch statistics,
dropout's random streams) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.errors import InvalidRngError

from moejax.base import Array, Layer, Params


def from_linen(module: Any, example: Array) -> Layer:
    """A ``flax.linen`` module as a layer.

    Args:
        module: the module, called as ``module(x)``.
        example: an input of the shape and dtype that it will see, for its initialisation.

    Returns:
        A layer whose params are the module's ``params`` collection.

    Raises:
        ValueError: at initialisation, if the module has other collections, or draws random numbers
            when it is applied, as ``linen.Dropout`` does unless it is deterministic.

    Example:
        >>> from flax import linen
        >>> expert = from_linen(linen.Dense(3), jnp.ones((1, 2)))
        >>> model = moejax.moe(expert, moejax.linear(2, 4), num_experts=4)
        >>> y, _ = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 2)))
        >>> y.shape
        (5, 3)
    """

    def init(key: Array) -> Params:
        variables = module.init(key, example)
        _refuse_state(type(module).__name__, set(variables) - {"params"})
        params = variables.get("params", {})
        try:
            jax.eval_shape(apply, params, example)
        except InvalidRngError:  # with the key of `init` there was one
            _refuse_state(type(module).__name__, {"a random stream"})
        return params

    def apply(params: Params, x: Array) -> Array:
        return module.apply({"params": params}, x)

    return Layer(init, apply)


def from_nnx(make: Callable[[Any], Any]) -> Layer:
    """A ``flax.nnx`` module as a layer.

    Args:
        make: ``rngs -> module``, such as ``lambda rngs: nnx.Linear(2, 3, rngs=rngs)``; the module
            is called as ``module(x)``.

    Returns:
        A layer whose params are the module's ``nnx.Param`` variables as a dict of arrays.

    Raises:
        ValueError: if the module has variables of other types, or ``make`` is a module itself.

    Example:
        >>> from flax import nnx
        >>> expert = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
        >>> params = moejax.stack(expert, 4).init(jax.random.key(0))
        >>> params["kernel"].shape
        (4, 2, 3)
    """
    if isinstance(make, nnx.Module):
        name = type(make).__name__
        raise ValueError(
            f"`make` must be a function that makes the module, got a {name} already made: pass "
            f"lambda rngs: {name}(..., rngs=rngs)."
        )
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, *states = nnx.split(abstract, nnx.Param, Ellipsis)
    shapes, rest = states
    kinds = {type(leaf).__name__ for leaf in nnx.to_flat_state(rest).leaves}
    _refuse_state(type(abstract).__name__, kinds)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, x: Array) -> Array:
        state = nnx.clone(shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    return Layer(init, apply)


def _refuse_state(name: str, kinds: set[str]) -> None:
    if kinds:
        raise ValueError(
            f"A layer is a pure function of its parameters, but {name} also has {sorted(kinds)}: "
            "remove what keeps them (batch normalisation, dropout), or write `init` and `apply` "
            "yourself."
        )
