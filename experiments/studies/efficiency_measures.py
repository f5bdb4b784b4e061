"""What a head costs: a turn of its compiled program, and what can be counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from benchmarks.timing import planned_bytes
from parts.compiling import compiled
from studies.heads import Head
from studies.sharpness_models import FEATURES

TURN = 0.2  # seconds that a turn lasts at least


def turn_of(head: Head, batch: int) -> Callable[[jax.Array], dict[str, Any]]:
    """A head's turns: it is compiled at the first one, and called many times in each.

    Returns:
        ``keys -> measures``, one row per key: ``microseconds`` per image, the ``bytes`` of
        arguments, results and temporaries, ``operations`` per image, and ``parameters`` in all and
        those ``active`` for one image.
    """

    @cache
    def prepared() -> tuple[Any, Any, dict[str, float]]:
        start = jax.jit(partial(drawn, head, batch))
        params, x = start(jax.random.key(0))
        program, _ = compiled(lambda params, x: head.layer.apply(params, x)[0], params, x)
        known = counts(head, params) | {"bytes": planned_bytes(program)["peak_bytes"]}
        return start, program, known

    def measure(keys: jax.Array) -> dict[str, Any]:
        start, program, known = prepared()
        times = []
        for key in keys:
            run = partial(program, *start(key))
            jax.block_until_ready(run())
            times.append(1e6 * seconds_of(run) / batch)
        return {"microseconds": np.array(times)} | {
            name: np.full(len(times), value) for name, value in known.items()
        }

    return measure


def drawn(head: Head, batch: int, key: jax.Array) -> tuple[Any, jax.Array]:
    """Parameters, and random features for them, [batch, FEATURES]."""
    init_key, features_key = jax.random.split(key)
    return head.layer.init(init_key), jax.random.normal(features_key, (batch, FEATURES))


def seconds_of(run: Callable[[], Any]) -> float:
    """The median seconds of a call in one turn."""
    times: list[float] = []
    while sum(times) < TURN:
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def counts(head: Head, params: Any) -> dict[str, float]:
    """Operations per image, two for each weight that multiplies; and parameters.

    An expert that serves one image in four counts for a quarter.
    """
    experts = params.get("experts", {})
    others = {name: value for name, value in params.items() if name != "experts"}
    parts = [(others, 1.0), (experts, head.active)]
    return {
        "operations": sum(2 * share * size_of(kernels(tree)) for tree, share in parts),
        "parameters": sum(size_of(jax.tree.leaves(tree)) for tree, _ in parts),
        "active": sum(share * size_of(jax.tree.leaves(tree)) for tree, share in parts),
    }


def kernels(tree: Any) -> list[jax.Array]:
    """The weights that multiply: all but the biases."""
    named = jax.tree.leaves_with_path(tree)
    return [leaf for path, leaf in named if path[-1] == jax.tree_util.DictKey("kernel")]


def size_of(leaves: list[jax.Array]) -> int:
    """How many numbers they hold."""
    return sum(leaf.size for leaf in leaves)
