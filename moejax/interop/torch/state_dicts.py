"""The two functions that follow a layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.base import Params
from moejax.interop.torch.layouts import Layout, Tensor
from moejax.interop.torch.tensors import as_array

StateDict = dict[str, np.ndarray]


def to_torch(layout: Layout, params: Params) -> StateDict:
    """Writes params as a ``state_dict``.

    Args:
        layout: where each parameter goes.
        params: of the layout's structure.

    Returns:
        A dict of new NumPy arrays, each of its parameter's dtype. In PyTorch:
        ``module.load_state_dict(conversion.as_tensors(state_dict))``.

    Raises:
        ValueError: if the structure or a shape is not the layout's, or if the layout has one name
            for two tensors.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2, bias=False)
        >>> to_torch(layout, {"kernel": np.ones((3, 2))})["weight"].shape
        (2, 3)
    """
    _check_names(layout)
    expected: Any = jax.tree.structure(layout)
    structure: Any = jax.tree.structure(params)
    if structure != expected:
        raise ValueError(f"`params` must have the structure {expected}, got {structure}.")
    state_dict: StateDict = {}
    tensors, _ = jax.tree.flatten_with_path(layout)
    for (path, tensor), leaf in zip(tensors, jax.tree.leaves(params), strict=True):
        if np.shape(leaf) != tensor.param_shape:
            raise ValueError(
                f"`params` must have shape {tensor.param_shape} at "
                f"{jax.tree_util.keystr(path, simple=True, separator='.')}, got {np.shape(leaf)}."
            )
        for place, key in tensor.parts():
            part = np.transpose(np.asarray(leaf)[place], np.argsort(tensor.axes))
            state_dict[key] = np.array(part, order="C")
    return state_dict


def from_torch(layout: Layout, state_dict: Mapping[str, Any]) -> Params:
    """Reads params from a ``state_dict``.

    Args:
        layout: where each parameter lies.
        state_dict: arrays by name; the tensors of ``module.state_dict()`` will do, of any dtype,
            if they are on the CPU.

    Returns:
        Params of new NumPy arrays, each of its tensor's dtype: float64 stays float64, which JAX
        would narrow unless told otherwise.

    Raises:
        ValueError: if the number of experts, a name or a shape is not the layout's, if the layout
            has one name for two tensors, or if a tensor cannot be read; names the tensor.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2, bias=False)
        >>> from_torch(layout, {"weight": np.ones((2, 3))})["kernel"].shape
        (3, 2)
    """
    _check_names(layout)
    _check_counts(layout, state_dict)
    _check_keys(layout, state_dict)
    return jax.tree.map(lambda tensor: _read(tensor, state_dict), layout)


def _read(tensor: Tensor, state_dict: Mapping[str, Any]) -> np.ndarray:
    parts = [
        np.transpose(_checked(tensor, key, state_dict), tensor.axes) for _, key in tensor.parts()
    ]
    return np.stack(parts).reshape(tensor.param_shape)  # [E ..., D, O]; always a copy


def _checked(tensor: Tensor, key: str, state_dict: Mapping[str, Any]) -> np.ndarray:
    array = as_array(key, state_dict[key])
    if array.shape != tensor.shape:
        raise ValueError(f"`{key}` must have shape {tensor.shape}, got {array.shape}.")
    return array


def _check_names(layout: Layout) -> None:
    names = Counter(key for tensor in jax.tree.leaves(layout) for _, key in tensor.parts())
    repeated = sorted(name for name, count in names.items() if count > 1)
    if repeated:
        raise ValueError(
            f"Every tensor of a layout must have its own name, but it has {repeated} more than "
            "once: give its parts different names, or put them at different places with `at`."
        )


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
