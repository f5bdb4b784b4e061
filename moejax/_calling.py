"""Gives a key, a mask or a matrix product to the functions whose signature asks for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from moejax._comparing import Made
from moejax._reading import reads
from moejax.base import Array, Expert, Layer, Rule


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` names this keyword argument (``partial`` and ``wraps`` included).

    A bare ``**kwargs`` does not count: what it is forwarded to may not know the keyword.
    """
    return name in inspect.signature(function).parameters


def options_for(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """The arguments that are given, not None, and that a function takes, by name or by ``**``."""
    parameters = inspect.signature(function).parameters
    forwards = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {
        name: value
        for name, value in given.items()
        if value is not None and (forwards or name in parameters)
    }


def with_matmul(expert: Callable[..., Array], matmul: Callable[..., Array]) -> Expert:
    """The expert with this matrix product, if it takes one."""
    if not accepts(expert, "matmul"):
        return expert
    # A pytree, so that `jit` and `checkpoint` around the expert take it as an argument.
    return partial(expert, matmul=jax.tree_util.Partial(matmul))


def hashable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a static argument of `jit`: equal at two calls only if it does the same.

    A bound method is equal to itself even if its object has changed since, and so is an object
    that can be called, or a function that reads one. So a new function, of the same signature, is
    made around it each time, and no program compiled for it earlier is found again.
    """
    values = reads(function)
    if values is not None:
        return Made(function, (function, values)) if values else function

    @functools.wraps(function, updated=())
    def anew(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return anew


def only_accepted(router: Layer, *, key: Array | None) -> dict[str, Array | None]:
    """The key as a keyword argument for a router that takes one, and nothing for any other."""
    return {"key": key} if accepts(router.apply, "key") else {}


def check_rule(route: Rule, outputs: tuple[Array, ...], given: dict[str, Any]) -> None:
    needed = [
        one.name
        for one in inspect.signature(route).parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.default is one.empty and one.name not in given
    ]
    if needed:
        raise ValueError(
            f"The rule needs {' and '.join(f'`{name}`' for name in needed)}: bind what it needs "
            "with `functools.partial`, as in route=partial(moejax.top_k, k=2)."
        )
    try:
        inspect.signature(route).bind(*outputs, **given)
    except TypeError as error:
        raise ValueError(
            f"The rule must take what the router returns, {len(outputs)} arrays, got: {error}. "
            "`noisy` goes with `noisy_top_k`, `biased` with `sigmoid_top_k` or `by_score`, and "
            "any other router with a rule of the logits alone."
        ) from error


def keeps_own(route: Rule, name: str, value: Array | None) -> bool:
    """Whether no value is given and the rule has its own: a default, or one bound by `partial`."""
    default = inspect.signature(route).parameters[name].default
    return value is None and default is not inspect.Parameter.empty
