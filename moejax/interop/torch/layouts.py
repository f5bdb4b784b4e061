"""Layouts: where in a ``state_dict`` the parameters of a layer lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

Layout = Any  # a pytree of `Tensor`, of the structure of the params


class Part(NamedTuple):
    """A part of a tensor: every ``step``-th index of one axis, from ``start`` to before ``stop``.

    Attributes:
        axis: an axis of the tensor in the ``state_dict``.
        start: the first index.
        stop: the end, which is not included.
        step: 1 for neighbours; 2 for every other index.

    Example:
        >>> gate = Tensor("gate_up.weight", (8, 3), (1, 0), part=Part(axis=0, start=0, stop=4))
        >>> gate.param_shape
        (3, 4)
    """

    axis: int
    start: int
    stop: int
    step: int = 1

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index the tensor with."""
        return (slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)

    @property
    def covers(self) -> range:
        """The indices of the axis that belong to the part."""
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True)
class Tensor:
    """Where one parameter lies in a ``state_dict``.

    Attributes:
        key: its name there; a ``{}`` for every leading axis of the parameter that PyTorch spreads
            over several tensors, such as ``experts.{}.weight``.
        shape: the shape of each tensor there.
        axes: permutation that turns such a tensor into the parameter, as in ``numpy.transpose``;
            its inverse turns it back.
        counts: sizes of the leading axes, one for every ``{}``.
        part: which part of the tensor is the parameter; None for all of it. The other parts must
            be parameters of the same layout, see `parts`.
        stored: the shape in which it is stored, with as many numbers; None for ``shape``.

    Example:
        >>> tensor = Tensor("experts.{}.weight", (2, 3), (1, 0), counts=(4,))
        >>> tensor.param_shape  # four tensors [2, 3], transposed and stacked
        (4, 3, 2)
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    counts: tuple[int, ...] = ()
    part: Part | None = None
    stored: tuple[int, ...] | None = None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part of a tensor that is the parameter."""
        if self.part is None:
            return self.shape
        axis = self.part.axis
        return (*self.shape[:axis], len(self.part.covers), *self.shape[axis + 1 :])

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return (*self.counts, *(self.part_shape[axis] for axis in self.axes))

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
        >>> kernel = linear(3, 2)["kernel"]
        >>> kernel.key, kernel.shape, kernel.axes
        ('weight', (2, 3), (1, 0))
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
        gate: name of the layer whose output goes through the activation; Mixtral calls it ``w1``.
        up: name of the layer whose output is multiplied with the gate's; ``w3``.
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
        num_experts: E, how many there are.

    Returns:
        A layout.

    Example:
        >>> kernel = stack(linear(3, 2), 4)["kernel"]
        >>> kernel.key, kernel.shape, kernel.counts
        ('{}.weight', (2, 3), (4,))
    """
    return jax.tree.map(
        lambda t: replace(t, key="{}." + t.key, counts=(num_experts, *t.counts)), layout
    )


def stacked(layout: Layout, num_experts: int) -> Layout:
    """The layout of `moejax.stack` in tensors that hold all experts along their own axis 0.

    Args:
        layout: of one expert, with no axis that is spread over several tensors.
        num_experts: E, how many there are.

    Returns:
        A layout.

    Raises:
        ValueError: if a parameter is spread over several tensors, or is stored in another shape.

    Example:
        >>> kernel = stacked(linear(3, 2), 4)["kernel"]
        >>> kernel.key, kernel.shape, kernel.param_shape
        ('weight', (4, 2, 3), (4, 3, 2))
    """

    def one(tensor: Tensor) -> Tensor:
        if tensor.counts or tensor.stored is not None:
            raise ValueError(
                f"`{tensor.key}` cannot hold all experts: it is spread over several tensors or "
                "stored in another shape, so stack it first."
            )
        part = tensor.part and tensor.part._replace(axis=tensor.part.axis + 1)
        axes = (0, *(axis + 1 for axis in tensor.axes))
        return replace(tensor, shape=(num_experts, *tensor.shape), axes=axes, part=part)

    return jax.tree.map(one, layout)


def parts(
    tensor: Tensor, num: int, *, axis: int = 0, interleaved: bool = False
) -> tuple[Tensor, ...]:
    """Equal parts of one tensor, each its own parameter, such as of a fused ``gate_up_proj``.

    Args:
        tensor: the whole, as if it were one parameter.
        num: how many parts.
        axis: the axis of the tensor in the ``state_dict`` that is divided.
        interleaved: whether part i is every ``num``-th index from i; if not, the parts are blocks,
            one after another.

    Returns:
        Where each part lies; a layout must have all of them.

    Raises:
        ValueError: if the axis does not divide; names the tensor.

    Example:
        >>> gate, up = parts(Tensor("gate_up_proj.weight", (16, 4), (1, 0)), 2)
        >>> up.part, up.param_shape
        (Part(axis=0, start=8, stop=16, step=1), (4, 8))
    """
    size = tensor.shape[axis]
    if size % num:
        raise ValueError(
            f"Axis {axis} of `{tensor.key}` must divide into {num} equal parts, got {size}."
        )
    each = size // num
    pieces = [
        Part(axis, i, size, num) if interleaved else Part(axis, i * each, (i + 1) * each)
        for i in range(num)
    ]
    return tuple(replace(tensor, part=piece) for piece in pieces)


def moe(
    expert: Layout,
    router: Layout,
    *,
    num_experts: int,
    gate: str = "gate",
    experts: str = "experts",
) -> Layout:
    """The layout of `moejax.moe` as a module with a gate and a list of experts.

    For a mixture with other names, write the layout out:
    ``{"router": at("gate", ...), "experts": at("experts", stack(...))}``.

    Args:
        expert: layout of one expert.
        router: layout of the router.
        num_experts: E, how many there are.
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
