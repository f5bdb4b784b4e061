"""What an expert closes over, as arguments: the derivatives of the engine must see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Array, Expert, Params
from moejax.schedules._sorted.policy import Policy

Apply = Callable[[Params, Array, list[Array]], Array]  # (params, x, what it closes over) -> y


def closed(expert: Expert, params: Params, x: Array, policy: Policy) -> tuple[Apply, list[Array]]:
    """Turns the traced arrays that an expert closes over into arguments, keys and integers, too.

    Args:
        expert: any pure function.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        policy: says how many rows the expert will get.

    Returns:
        The expert with those arrays as its third argument, for the policy's numbers of rows; and
        the arrays.
    """
    one, row = jax.eval_shape(lambda *both: jax.tree.map(lambda a: a[0], both), params, x)
    converted: dict[int, tuple[Callable[..., Array], list[int]]] = {}
    shared: dict[int, Array] = {}
    for size in {*(group.capacity for group in policy.groups), *policy.blocks} - {0}:
        rows = jax.eval_shape(partial(jnp.broadcast_to, shape=(size, *row.shape)), row)
        apply, own = _converted(expert, one, rows)
        shared |= {id(array): array for array in own}
        converted[size] = apply, [id(array) for array in own]

    def of_size(params: Params, x: Array, arrays: list[Array]) -> Array:
        apply, own = converted[len(x)]
        known = dict(zip(shared, arrays, strict=True))
        return apply(params, x, [known[name] for name in own])

    return of_size, list(shared.values())


def _converted(expert: Expert, *like: Any) -> tuple[Callable[..., Array], list[Array]]:
    """The expert for arguments like these, and the traced arrays that it then needs beside them.

    `jax.closure_convert` leaves out what has no derivative, such as a key or an index.
    """
    jaxpr, consts = (made := jax.make_jaxpr(expert)(*like)).jaxpr, made.consts
    traced = [isinstance(one, jax.core.Tracer) for one in consts]

    def apply(params: Params, x: Array, arrays: list[Array]) -> Array:
        given = iter(arrays)
        known = [
            next(given) if is_traced else one for one, is_traced in zip(consts, traced, strict=True)
        ]
        [y] = jax.core.eval_jaxpr(jaxpr, known, *jax.tree.leaves((params, x)))
        return y

    return apply, [one for one, is_traced in zip(consts, traced, strict=True) if is_traced]
