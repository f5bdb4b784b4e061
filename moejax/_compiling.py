"""Functions that are compiled as a whole, wherever they are called.

Outside of `jax.jit`, JAX compiles each operation separately, which takes several times as long as
compiling the whole function: a notebook would wait at every first call. Inside of `jax.jit` the
function is one call, which XLA inlines. The backward pass is one program, too, even without `jit`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from moejax._comparing import has_hash

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[Function], Function]:
    """Compiles a function once for each shape of its arrays and each value of its ``static``.

    A static argument that cannot be hashed, such as an array where a number is due, is given to
    the uncompiled function, which refuses it with its own message.
    """

    def decorate(function: Function) -> Function:
        jitted = jax.jit(function, static_argnames=static)
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if all(has_hash(given.get(name)) for name in static):
                return jitted(*args, **kwargs)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate
