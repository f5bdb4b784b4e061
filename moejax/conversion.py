"""Parameters to and from PyTorch ``state_dict``s, in NumPy, without PyTorch.

A layout says where in a ``state_dict`` each parameter lies: it is a pytree of the structure of the
params, with a `Tensor` at every leaf. Layouts compose as the layers do, and two functions follow
them, `to_torch` and `from_torch`; the way there and back is exact.

Example:
    >>> from moejax import conversion
    >>> model = moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, 2), num_experts=2)
    >>> layout = conversion.moe(conversion.linear(2, 1), conversion.mlp(2, 4, 2), num_experts=2)
    >>> state_dict = conversion.to_torch(layout, model.init(jax.random.key(0)))
    >>> for name, tensor in sorted(state_dict.items()):
    ...     print(name, tensor.shape)
    experts.0.bias (1,)
    experts.0.weight (1, 2)
    experts.1.bias (1,)
    experts.1.weight (1, 2)
    gate.0.bias (4,)
    gate.0.weight (4, 2)
    gate.2.bias (2,)
    gate.2.weight (2, 4)
    >>> params = conversion.from_torch(layout, state_dict)
    >>> params["experts"]["kernel"].shape
    (2, 2, 1)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from moejax.types import Params

StateDict = dict[str, np.ndarray]
Layout = Any  # a pytree of `Tensor`, of the structure of the params


@dataclass(frozen=True)
class Tensor:
    """Where one parameter lies in a ``state_dict``.

    Attributes:
        key: its name there; a ``{}`` for every leading axis of the parameter that PyTorch spreads
            over several tensors, such as ``experts.{}.weight``.
        shape: the shape of each tensor there.
        axes: permutation that turns such a tensor into the parameter, as in `numpy.transpose`;
            its inverse turns it back.
        counts: sizes of the leading axes, one for every ``{}``.
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    counts: tuple[int, ...] = ()

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return (*self.counts, *(self.shape[axis] for axis in self.axes))

    def parts(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Every tensor that holds a part of the parameter: its place and its name."""
        for place in np.ndindex(*self.counts):
            yield place, self.key.format(*place)


def linear(d_in: int, d_out: int, *, bias: bool = True) -> Layout:
    """The layout of `moejax.linear` as a ``torch.nn.Linear``, whose weight is ``[O, D]``.

    Args:
        d_in: input width D.
        d_out: output width O.
        bias: whether it has one.

    Returns:
        A layout.

    Example:
        >>> linear(3, 2)["kernel"]
        Tensor(key='weight', shape=(2, 3), axes=(1, 0), counts=())
    """
    layout = {"kernel": Tensor("weight", (d_out, d_in), (1, 0))}
    return layout | {"bias": Tensor("bias", (d_out,), (0,))} if bias else layout


def mlp(*widths: int, names: Sequence[str] | None = None, bias: bool = True) -> Layout:
    """The layout of `moejax.mlp` as a ``torch.nn.Sequential`` of linear layers and activations.

    Args:
        *widths: D, the hidden widths, O.
        names: what the linear layers are called there; by default "0", "2", "4", ..., with an
            activation after each but the last.
        bias: whether the layers have one.

    Returns:
        A layout.

    Raises:
        ValueError: if there is not one name per layer.

    Example:
        >>> [layer["bias"].key for layer in mlp(784, 50, 10, names=("fc1", "fc2"))["layers"]]
        ['fc1.bias', 'fc2.bias']
    """
    pairs = list(pairwise(widths))
    names = [str(2 * i) for i in range(len(pairs))] if names is None else names
    if len(names) != len(pairs):
        raise ValueError(f"`names` must name each of the {len(pairs)} layers, got {names}.")
    layers = [at(name, linear(*pair, bias=bias)) for name, pair in zip(names, pairs, strict=True)]
    return {"layers": layers}


def glu(
    d_model: int,
    d_hidden: int,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    bias: bool = False,
) -> Layout:
    """The layout of `moejax.glu` as a module with three linear layers.

    Args:
        d_model: input and output width D.
        d_hidden: hidden width F.
        gate: name of the layer that goes through the activation; Mixtral calls it ``w1``.
        up: name of the layer that is multiplied with it; ``w3``.
        down: name of the last layer; ``w2``.
        bias: whether the layers have one.

    Returns:
        A layout.

    Example:
        >>> glu(4, 8)["down"]["kernel"].key
        'down_proj.weight'
    """
    return {
        "gate": at(gate, linear(d_model, d_hidden, bias=bias)),
        "up": at(up, linear(d_model, d_hidden, bias=bias)),
        "down": at(down, linear(d_hidden, d_model, bias=bias)),
    }


def stack(layout: Layout, num_experts: int) -> Layout:
    """The layout of `moejax.stack` as a ``torch.nn.ModuleList``: axis 0 spreads over the experts.

    Args:
        layout: of one expert.
        num_experts: E.

    Returns:
        A layout.

    Example:
        >>> stack(linear(3, 2), 4)["kernel"]
        Tensor(key='{}.weight', shape=(2, 3), axes=(1, 0), counts=(4,))
    """
    return jax.tree.map(
        lambda t: replace(t, key="{}." + t.key, counts=(num_experts, *t.counts)), layout
    )


def moe(
    expert: Layout,
    router: Layout,
    *,
    num_experts: int,
    gate: str = "gate",
    experts: str = "experts",
) -> Layout:
    """The layout of `moejax.moe` as a module with a gate and a list of experts.

    A mixture that is called otherwise is as quickly written out:
    ``{"router": at("gate", ...), "experts": at("experts", stack(...))}``.

    Args:
        expert: layout of one expert.
        router: layout of the router.
        num_experts: E.
        gate: what the router is called there.
        experts: what the list of experts is called there.

    Returns:
        A layout.

    Example:
        >>> moe(linear(2, 1), linear(2, 4), num_experts=4)["experts"]["bias"].key
        'experts.{}.bias'
    """
    return {"router": at(gate, router), "experts": at(experts, stack(expert, num_experts))}


def at(name: str, layout: Layout) -> Layout:
    """The same layout, one module further down.

    Args:
        name: the submodule.
        layout: its layout.

    Returns:
        A layout.

    Example:
        >>> at("head", linear(3, 2))["bias"].key
        'head.bias'
    """
    return jax.tree.map(lambda t: replace(t, key=f"{name}.{t.key}"), layout)


def to_torch(layout: Layout, params: Params) -> StateDict:
    """Writes params as a ``state_dict``.

    Args:
        layout: where each parameter goes.
        params: of the layout's structure.

    Returns:
        A dict of new NumPy arrays, each of its parameter's dtype. In PyTorch:
        ``module.load_state_dict({name: torch.from_numpy(a) for name, a in state_dict.items()})``.

    Raises:
        ValueError: if the structure or a shape is not the layout's.

    Example:
        >>> to_torch(linear(3, 2, bias=False), {"kernel": np.ones((3, 2))})["weight"].shape
        (2, 3)
    """
    tensors, expected = jax.tree.flatten_with_path(layout)
    leaves, structure = jax.tree.flatten(params)
    if structure != expected:
        raise ValueError(f"`params` must have the structure {expected}, got {structure}.")
    state_dict: StateDict = {}
    for (path, tensor), leaf in zip(tensors, leaves, strict=True):
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
        state_dict: arrays by name; the tensors of ``module.state_dict()`` will do if they are on
            the CPU and of a dtype that NumPy has (bfloat16 is not).

    Returns:
        Params of new NumPy arrays, each of its tensor's dtype: float64 stays float64, which JAX
        would narrow unless told otherwise.

    Raises:
        ValueError: if the number of experts, a name or a shape is not the layout's.

    Example:
        >>> from_torch(linear(3, 2, bias=False), {"weight": np.ones((2, 3))})["kernel"].shape
        (3, 2)
    """
    _check_counts(layout, state_dict)
    _check_keys(layout, state_dict)
    return jax.tree.map(lambda tensor: _read(tensor, state_dict), layout)


def _read(tensor: Tensor, state_dict: Mapping[str, Any]) -> np.ndarray:
    parts = [
        np.transpose(_checked(tensor, key, state_dict), tensor.axes) for _, key in tensor.parts()
    ]
    return np.stack(parts).reshape(tensor.param_shape)  # [E ..., D, O]; always a copy


def _checked(tensor: Tensor, key: str, state_dict: Mapping[str, Any]) -> np.ndarray:
    array = np.asarray(state_dict[key])
    if array.shape != tensor.shape:
        raise ValueError(f"`{key}` must have shape {tensor.shape}, got {array.shape}.")
    return array


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
