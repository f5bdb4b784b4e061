"""A layer's params as nested dicts of names, the only shape that every Flax tool reads.

Lists and tuples become dicts with the keys "0", "1", ...: orbax would turn integer keys into such
strings anyway, and Linen takes a list for a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Array, Params

Path = tuple[str, ...]
Axes = Callable[[Path, Array], tuple[str | None, ...]]

ALONE = "value"  # the name of an array that is all the params of its layer
BALANCE = "balance_bias"  # what `moejax.biased` calls its bias


def expert_axes(path: Path, leaf: Array, *, name: str = "expert") -> tuple[str | None, ...]:
    """The names of a parameter's axes: stacked experts along one mesh axis, all else unnamed.

    As in `moejax.sharding.shardings`, a parameter belongs to the experts if ``"experts"`` is on
    its path; its leading axis is E.

    Args:
        path: where the parameter is, such as ``("experts", "gate", "kernel")``.
        leaf: the parameter, or its shape and dtype.
        name: the mesh axis (or logical axis) along which experts live.

    Returns:
        One name or None per axis; an empty tuple for a parameter that every device has.

    Example:
        >>> expert_axes(("experts", "gate", "kernel"), jnp.ones((8, 4, 16)))
        ('expert', None, None)
        >>> expert_axes(("router", "kernel"), jnp.ones((4, 8)))
        ()
    """
    if "experts" not in path or leaf.ndim == 0:
        return ()
    return (name, *[None] * (leaf.ndim - 1))


def named(params: Params) -> dict[Path, Any]:
    """The leaves of a pytree by their path."""
    return {path_of(entries): leaf for entries, leaf in jax.tree.leaves_with_path(params)}


def path_of(entries: tuple[Any, ...]) -> Path:
    """The names along a JAX path."""
    return tuple(
        jax.tree_util.keystr((entry,), simple=True, separator="") for entry in entries
    ) or (ALONE,)


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def at(tree: Any, path: Path) -> Any:
    """The value at a path in nested dicts."""
    for name in path:
        tree = tree[name]
    return tree


def cast(params: Params, dtype: Any) -> Params:
    """The params with their floats in another dtype; None leaves them as they are.

    A balance bias keeps its dtype, too: it moves by steps that bfloat16 would round away.
    """

    def to(path: tuple[Any, ...], leaf: Array) -> Array:
        kept = not jnp.issubdtype(leaf.dtype, jnp.floating) or path_of(path)[-1] == BALANCE
        return leaf if kept else leaf.astype(dtype)

    return params if dtype is None else jax.tree.map_with_path(to, params)
