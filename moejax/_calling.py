"""Who is given a key, a mask or a product: what a function's signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from moejax.base import Array, Layer


def accepts(function: Callable, name: str) -> bool:
    """Whether ``function`` names this keyword argument (``partial`` and ``wraps`` included).

    A bare ``**kwargs`` does not count: what it is forwarded to may not know the keyword.
    """
    return name in inspect.signature(function).parameters


def only_accepted(router: Layer, *, key: Array | None) -> dict[str, Array | None]:
    """The key as a keyword argument for a router that takes one, and nothing for another."""
    return {"key": key} if accepts(router.apply, "key") else {}


def check_rule(
    route: Callable[..., Any], outputs: tuple[Array, ...], given: dict[str, Any]
) -> None:
    try:
        inspect.signature(route).bind(*outputs, **given)
    except TypeError as error:
        raise ValueError(
            f"The rule must take what the router returns, {len(outputs)} arrays, got: {error}. "
            "`noisy` goes with `noisy_top_k`, any other router with a rule of the logits alone."
        ) from error


def keeps_own(route: Callable[..., Any], name: str, value: Array | None) -> bool:
    """Whether a rule has its own value for a missing one: a default, or bound by `partial`."""
    default = inspect.signature(route).parameters[name].default
    return value is None and default is not inspect.Parameter.empty
