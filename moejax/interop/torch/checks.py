"""Checks of a layout: every number of every tensor must be in exactly one parameter."""

from __future__ import annotations

from collections import defaultdict

import jax
import numpy as np

from moejax.interop.torch.layouts import Layout, Tensor

Uses = list[tuple[str, Tensor]]  # where in the params, and what of the tensor


def named(layout: Layout) -> Uses:
    """The tensors of a layout, each with the name of its parameter."""
    leaves, _ = jax.tree.flatten_with_path(layout)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), tensor) for path, tensor in leaves
    ]


def check_layout(layout: Layout) -> None:
    """Refuses a layout that uses a tensor twice, or leaves a part of one out."""
    uses: dict[str, Uses] = defaultdict(list)
    for name, tensor in named(layout):
        _check_stored(tensor)
        for _, key in tensor.parts():
            uses[key].append((name, tensor))
    for key, users in uses.items():
        if len(users) > 1 or users[0][1].part is not None:
            _check_parts(key, users)


def _check_stored(tensor: Tensor) -> None:
    stored = tensor.stored
    if stored is not None and np.prod(stored) != np.prod(tensor.shape):
        raise ValueError(
            f"`{tensor.key}` of shape {tensor.shape} must be stored in a shape of as many numbers, "
            f"got {stored}."
        )


def _check_parts(key: str, users: Uses) -> None:
    names = [name or "the parameter" for name, _ in users]
    wholes = {(tensor.shape, tensor.stored) for _, tensor in users}
    axes = {tensor.part.axis for _, tensor in users if tensor.part}
    if any(tensor.part is None for _, tensor in users) or len(axes) > 1:
        raise ValueError(f"`{key}` is used twice, by {names}: one tensor is one parameter.")
    if len(wholes) > 1:
        raise ValueError(f"`{key}` must have one shape, got {wholes} for {names}.")
    [axis] = axes
    used = np.zeros(users[0][1].shape[axis], int)
    for _, tensor in users:
        used[list(tensor.part.covers)] += 1  # type: ignore[union-attr]
    if (used > 1).any():
        raise ValueError(
            f"A part of `{key}` is used twice, by {names}: its parts must be distinct."
        )
    if (used < 1).any():
        raise ValueError(
            f"Parts of `{key}` are missing: {(used < 1).sum()} of {len(used)} along axis {axis} "
            f"are in no parameter, {names} have the others."
        )
