"""What a function reads besides its arguments, so that no program outlives a change of it.

`jax.jit` finds a program again by the function alone. Where the caller wrote no `jit`, a variable
that a function reads may have another value at the next call, and must then have another program.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import jax
import numpy as np

from moejax._comparing import Itself, Made, has_hash

# Their own variables stay as they are.
_LIBRARIES = frozenset({"jax", "flax", "moejax", "numpy", "optax"})
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)


def reads(function: Callable[..., Any]) -> tuple[Any, ...] | None:
    """The values that a function reads besides its arguments; None if one may change in place."""
    try:
        return tuple(_of_function(function, set()))
    except _MayChangeError:
        return None


class _MayChangeError(Exception):
    """A function reads what can change without becoming unequal."""


def _of_function(function: Any, seen: set[int]) -> Iterator[Any]:
    if id(function) in seen or isinstance(function, type):
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from _of_function(function.func, seen)
        for value in (*function.args, *function.keywords.values()):
            yield from _of_value(value, seen)
    elif isinstance(function, Made):
        for part in function.parts():
            yield from _of_function(part, seen)
    elif isinstance(function, FunctionType):
        for value in _variables(function):
            yield from _of_value(value, seen)
    elif inspect.ismethod(function) or _is_an_object(function) or not has_hash(function):
        raise _MayChangeError


def _of_value(value: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, _CONSTANTS):
        yield type(value), value  # 1 == True, but they do not act alike
    elif isinstance(value, jax.Array):
        yield Itself(value)
    elif isinstance(value, (tuple, frozenset)):
        for one in value:
            yield from _of_value(one, seen)
    elif callable(value):
        yield from _of_function(value, seen)
        yield value
    elif not isinstance(value, ModuleType):
        if not has_hash(value) or _is_compared_by_identity(type(value)):
            raise _MayChangeError
        yield type(value), value


def _variables(function: FunctionType) -> Iterator[Any]:
    """What a plain function closes over, its defaults, and the globals that it names.

    Of a library's function, such as what `jax.vmap` returns, the functions that it closes
    over: they may be the user's.
    """
    closed_over = [_content(cell) for cell in function.__closure__ or ()]
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        yield from filter(callable, closed_over)
        return
    yield from closed_over
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    known = function.__globals__
    yield from (known[name] for name in _names(function.__code__) if name in known)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _names(const)


def _is_an_object(function: Any) -> bool:
    """Whether it is an object that can be called, and compared by identity alone."""
    kind = type(function)
    called = inspect.isfunction(inspect.getattr_static(kind, "__call__", None))
    of_jax = kind.__module__.startswith("jax.")  # such as a function with a derivative of its own
    return called and _is_compared_by_identity(kind) and not of_jax


def _is_compared_by_identity(kind: type) -> bool:
    return inspect.getattr_static(kind, "__hash__") is object.__hash__
