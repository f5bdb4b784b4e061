"""Refuses forward mode, which the schedules do not define, and says what to do instead."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from jax.extend.core import Primitive


def reverse_only(tree: Any) -> Any:
    """The same arrays, differentiable in reverse mode only, any number of times.

    JAX also refuses forward mode through a `jax.custom_vjp`, but without a word on what to do.
    Placed before one, this raises first, with advice. It computes nothing.

    Args:
        tree: pytree of arrays.

    Returns:
        The same pytree.

    Raises:
        TypeError: where forward mode is evaluated.
    """
    same = _identity_primitive()
    return jax.tree.map(
        lambda leaf: same.bind(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree
    )


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "This schedule defines reverse mode alone, got forward-mode differentiation (`jax.jvp`, "
        "`jax.hessian`): pass `execute=moejax.dense`, or apply `jax.grad` twice."
    )


def _identity(x: Any) -> Any:
    return x


@cache
def _identity_primitive() -> Primitive:
    # Made when it is used: this import loads Pallas, a third of the time that moejax takes to load.
    from jax.extend.core import Primitive

    same, tangent = Primitive("reverse_only"), Primitive("reverse_only_tangent")
    for primitive in (same, tangent):
        primitive.def_abstract_eval(_identity)

    same.def_impl(_identity)
    batching.defvectorized(same)
    mlir.register_lowering(same, lambda _, x: [x])
    ad.primitive_jvps[same] = lambda primals, tangents: (
        same.bind(*primals),
        tangents[0] if isinstance(tangents[0], ad.Zero) else tangent.bind(*tangents),
    )

    # As a tangent it is linear: reverse mode transposes it and never evaluates it.
    tangent.def_impl(_refuse)
    batching.primitive_batchers[tangent] = _refuse
    mlir.register_lowering(tangent, _refuse)
    ad.deflinear2(tangent, lambda cotangent, _: [cotangent])
    return same
