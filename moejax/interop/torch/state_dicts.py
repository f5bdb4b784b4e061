"""The two functions that follow a layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moejax.base import Params
from moejax.interop.torch.checks import check_layout, named
from moejax.interop.torch.layouts import Layout, Tensor
from moejax.interop.torch.tensors import as_array

StateDict = dict[str, np.ndarray]


def to_torch(layout: Layout, params: Params) -> StateDict:
    """Writes params as a ``state_dict``.

    Args:
        layout: where each parameter goes.
        params: a pytree with the layout's structure.

    Returns:
        A dict of new NumPy arrays, each with its parameter's dtype. PyTorch loads it by
        ``module.load_state_dict(conversion.as_tensors(state_dict))``.

    Raises:
        ValueError: if the structure or a shape is not the layout's, or if the layout uses a tensor
            twice or leaves a part of one out.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2, bias=False)
        >>> to_torch(layout, {"kernel": np.ones((3, 2))})["weight"].shape
        (2, 3)
    """
    check_layout(layout)
    expected: Any = jax.tree.structure(layout)
    structure: Any = jax.tree.structure(params)
    if structure != expected:
        raise ValueError(f"`params` must have the structure {expected}, got {structure}.")
    state_dict: StateDict = {}
    for (path, tensor), leaf in zip(named(layout), jax.tree.leaves(params), strict=True):
        if np.shape(leaf) != tensor.param_shape:
            raise ValueError(
                f"`params` must have shape {tensor.param_shape} at {path}, got {np.shape(leaf)}."
            )
        for place, key in tensor.parts():
            part = np.transpose(np.asarray(leaf)[place], np.argsort(tensor.axes))
            state_dict[key] = _with_part(tensor, key, part, state_dict)
    return state_dict


def _with_part(tensor: Tensor, key: str, part: np.ndarray, state_dict: StateDict) -> np.ndarray:
    """The tensor with this part of it filled in."""
    stored = tensor.stored or tensor.shape
    if tensor.part is None:
        return np.array(part, order="C").reshape(stored)
    whole = state_dict.get(key)
    if whole is None:
        whole = np.empty(stored, part.dtype)
    if whole.dtype != part.dtype:
        raise ValueError(
            f"The parts of `{key}` must have one dtype, got {whole.dtype} and {part.dtype}."
        )
    whole.reshape(tensor.shape)[tensor.part.slices] = part
    return whole


def from_torch(layout: Layout, state_dict: Mapping[str, Any]) -> Params:
    """Reads params from a ``state_dict``.

    Args:
        layout: where each parameter lies.
        state_dict: arrays by name; the tensors of ``module.state_dict()`` will do, with any dtype,
            if they are on the CPU.

    Returns:
        Params of new NumPy arrays, each with its tensor's dtype. So float64 stays float64, which
        JAX would narrow unless told otherwise.

    Raises:
        ValueError: if the number of experts, a name or a shape is not the layout's, if the layout
            uses a tensor twice or leaves a part of one out, if tensors of one parameter differ in
            dtype, or if one cannot be read; names it.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2, bias=False)
        >>> from_torch(layout, {"weight": np.ones((2, 3))})["kernel"].shape
        (3, 2)
    """
    check_layout(layout)
    _check_counts(layout, state_dict)
    _check_keys(layout, state_dict)
    return jax.tree.map(lambda tensor: _read(tensor, state_dict), layout)


def _read(tensor: Tensor, state_dict: Mapping[str, Any]) -> np.ndarray:
    return read(tensor, lambda key: state_dict[key])


def read(tensor: Tensor, get: Callable[[str], Any]) -> np.ndarray:
    """One parameter from the tensors that ``get`` returns by name, one at a time."""
    param = None
    for place, key in tensor.parts():
        piece = np.transpose(_checked(tensor, key, get(key)), tensor.axes)
        if param is None:
            param = np.empty(tensor.param_shape, piece.dtype)
        if piece.dtype != param.dtype:
            raise ValueError(
                f"`{key}` must have the dtype of the tensors it is stacked with, {param.dtype}, "
                f"got {piece.dtype}."
            )
        param[place] = piece
    return np.empty(tensor.param_shape) if param is None else param  # [E ..., D, O]


def _checked(tensor: Tensor, key: str, value: Any) -> np.ndarray:
    array = as_array(key, value)
    stored = tensor.stored or tensor.shape
    if array.shape != stored:
        raise ValueError(f"`{key}` must have shape {stored}, got {array.shape}.")
    array = array.reshape(tensor.shape)
    return array if tensor.part is None else array[tensor.part.slices]


def _check_counts(layout: Layout, state_dict: Mapping[str, Any]) -> None:
    for tensor in jax.tree.leaves(layout):
        names = tensor.key.split("{}")
        for level, count in enumerate(tensor.counts):
            outer = r"\d+".join(re.escape(name) for name in names[: level + 1])
            found = _numbers(outer, state_dict)
            if found and len(found) != count:
                raise ValueError(
                    f"The layout has {count} experts at `{'{}'.join(names[: level + 1])}`, the "
                    f"state_dict {len(found)}: build the layout with that `num_experts`."
                )


def _numbers(prefix: str, state_dict: Mapping[str, Any]) -> set[str]:
    matches = (re.match(rf"{prefix}(\d+)(?:\.|$)", key) for key in state_dict)
    return {match[1] for match in matches if match}


def _check_keys(layout: Layout, state_dict: Mapping[str, Any]) -> None:
    expected = {key for tensor in jax.tree.leaves(layout) for _, key in tensor.parts()}
    missing, unknown = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unknown:
        raise ValueError(
            "The names of the state_dict must be the layout's: "
            f"missing {missing or 'none'}, not expected {unknown or 'none'}."
        )
