"""Refuses forward mode, which the schedules do not define, and says what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


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
    return jax.tree.map(
        lambda leaf: _same.bind(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree
    )


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "This schedule defines reverse mode alone, got forward-mode differentiation (`jax.jvp`, "
        "`jax.hessian`): pass `execute=moejax.dense`, or apply `jax.grad` twice."
    )


def _identity(x: Any) -> Any:
    return x


_same, _tangent = Primitive("reverse_only"), Primitive("reverse_only_tangent")
for primitive in (_same, _tangent):
    primitive.def_abstract_eval(_identity)

_same.def_impl(_identity)
batching.defvectorized(_same)
mlir.register_lowering(_same, lambda _, x: [x])
ad.primitive_jvps[_same] = lambda primals, tangents: (
    _same.bind(*primals),
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent.bind(*tangents),
)

# As a tangent it is linear: reverse mode transposes it and never evaluates it.
_tangent.def_impl(_refuse)
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
