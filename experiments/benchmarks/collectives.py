"""What a compiled program sends between devices, read from the program and not from a stopwatch."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

_OPERATION = re.compile(
    r" = (?P<shape>.+?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|"
    r"ragged-all-to-all|reduce-scatter)(?P<asynchronous>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective operation of a compiled program.

    Attributes:
        kind: such as ``"all-to-all"``.
        group: how many devices take part in one exchange.
        sent: the fewest bytes that can leave every device for this operation: for results of b
            bytes, ``b (g - 1) / g`` for an all-to-all or an all-gather, twice that for an
            all-reduce, ``b (g - 1)`` for a reduce-scatter, and b for a permutation.
        always: whether it runs whenever the program does, not only in a branch.
    """

    kind: str
    group: int
    sent: float
    always: bool


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """The collective operations of a compiled program; those in loops count once.

    Args:
        compiled: from ``jax.jit(f).lower(...).compile()``, for CPU devices.

    Returns:
        One record per operation that involves more than one device.

    Raises:
        ValueError: if the program splits its operations into a start and an end.

    Example:
        >>> mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("data")))
        >>> [mean] = collectives(jax.jit(jnp.sum).lower(x).compile())
        >>> mean.kind, mean.group, mean.sent  # one float32, there and back
        ('all-reduce', 4, 6.0)
    """
    bodies = _computations(compiled.as_text() or "")
    always = _reached(bodies)
    found = [
        _collective(line, name in always)
        for name, lines in bodies.items()
        for line in lines
        if _OPERATION.search(line)
    ]
    return [one for one in found if one.group > 1]


def bytes_sent(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes that leave every device each time the program runs, by kind of operation.

    Args:
        compiled: from ``jax.jit(f).lower(...).compile()``.

    Returns:
        Bytes by kind, for operations outside of branches.

    Example:
        >>> bytes_sent(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
        {}
    """
    total: dict[str, float] = {}
    for one in collectives(compiled):
        if one.always:
            total[one.kind] = total.get(one.kind, 0) + one.sent
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by its name; the program's own is called ``ENTRY``."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = "ENTRY" if header[1] else header[2]
        bodies.setdefault(name, []).append(line)
    return bodies


def _reached(bodies: dict[str, list[str]]) -> set[str]:
    """The computations that run whenever the program does: all but the branches of conditionals."""
    reached, left = set(), ["ENTRY"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += [callee for line in bodies[name] for callee in _CALLED.findall(line)]
    return reached


def _collective(line: str, always: bool) -> Collective:
    operation = _OPERATION.search(line)
    assert operation is not None  # the caller found one
    if operation["asynchronous"]:
        raise ValueError(
            "The program must be compiled for CPU devices, where collectives are one operation "
            f"each, got {operation['kind']}-start: use --xla_force_host_platform_device_count."
        )
    kind, group = operation["kind"], _group_size(line)
    result = sum(_bytes(*array) for array in _ARRAY.findall(operation["shape"]))
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}
    return Collective(kind, group, result * factor.get(kind, share), always)


def _bytes(dtype: str, shape: str) -> float:
    width = re.search(r"\d+", dtype)  # f32, bf16, f8e4m3fn; pred has none
    bits = int(width[0]) if width else 8
    return math.prod(int(n) for n in shape.split(",") if n) * bits / 8


def _group_size(line: str) -> int:
    """How many devices exchange with each other, from any of the notations for their groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):  # [2,4]<=[8]
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # mesh['a'=2] {'a'}
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", named[2]))
    return 2  # a permutation names pairs of devices
