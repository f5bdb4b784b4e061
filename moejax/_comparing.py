"""Layers that can be compared: two that are made in the same way are equal, and share one trace.

A closure compares by identity, so a freshly built layer would be a new key to every cache of JAX.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar, cast

Maker = TypeVar("Maker", bound=Callable[..., Any])


class Made:
    """A function that is equal to another by a key: by what made it, or by what it reads."""

    def __init__(self, function: Callable[..., Any], key: Hashable) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._key = key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Made) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def parts(self) -> Iterator[Callable[..., Any]]:
        """The functions in its key."""
        return _functions(self._key)


class Itself:
    """Stands for a value that has no hash, such as an array; equal only to itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def comparable(make: Maker) -> Maker:
    """Makes what a function returns comparable: a function, or a named tuple with functions.

    Results are equal if the arguments were: numbers and functions as Python compares them, partials
    by what they bind, arrays by identity. The functions must be determined by the arguments.

    Args:
        make: such as ``linear``.

    Returns:
        The same maker.

    Example:
        >>> make = comparable(lambda d: lambda x: d * x)
        >>> make(2) == make(2), make(2) == make(3), make(2)(5)
        (True, False, 10)
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        result = make(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        key = (make, *(_key(value) for value in bound.arguments.values()))
        if isinstance(result, tuple):
            return type(result)(*(_made(part, (key, i)) for i, part in enumerate(result)))
        return _made(result, (key, 0))

    return cast(Maker, made)


def _made(part: Any, key: Hashable) -> Any:
    return Made(part, key) if callable(part) else part


def _key(value: Any) -> Hashable:
    if isinstance(value, functools.partial):
        return (_key(value.func), _key(value.args), _key(value.keywords))
    if isinstance(value, dict):
        return frozenset((name, _key(one)) for name, one in value.items())
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_key, value))
    if not has_hash(value):
        return Itself(value)
    return (type(value), value)  # 1 == True, but as arguments they differ


def _functions(key: Hashable) -> Iterator[Callable[..., Any]]:
    """The functions in what `_key` returns."""
    if isinstance(key, (tuple, frozenset)):
        for one in key:
            yield from _functions(one)
    elif callable(value := key.value if isinstance(key, Itself) else key):
        yield value


def has_hash(value: Any) -> bool:
    """Whether a value can be hashed; a frozen dataclass that holds an array only seems to."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
