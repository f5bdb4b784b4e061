"""Functions that are compiled as a whole, wherever they are called.

Outside of `jax.jit`, JAX compiles each operation by itself, which takes several times as long as
the function at once: a notebook would wait for it at every first call. Inside of `jax.jit` the
function is one call, which XLA inlines; so its backward pass is one program without `jit`, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[Function], Function]:
    """Compiles a function once for each shape of its arrays and each value of its ``static``."""

    def decorate(function: Function) -> Function:
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return jitted(*args, **kwargs)

        return cast(Function, call)

    return decorate
