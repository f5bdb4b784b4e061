"""ReLU routing: what a layer costs when tokens choose fewer and fewer of the experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

import moejax
from benchmarks.layers import DROPLESS, layer_contenders
from benchmarks.peers import Shape
from benchmarks.timing import Result, measure

SPARSITIES = (0.0, 0.5, 0.75, 0.89, 0.94)
FULL, QUICK = Shape(T=2048, D=128, F=256, E=16, K=16), Shape(T=64, D=16, F=32, E=8, K=8)


def relu_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """`dense` and `dropless` under `relu` routing, for several shares of gates that are zero."""
    shape = QUICK if quick else FULL
    for sparsity in SPARSITIES[2:3] if quick else SPARSITIES:
        route = partial(relu_of_sparsity, sparsity)
        contenders = [
            *layer_contenders("dense", shape, moejax.dense, route=route),
            *layer_contenders(DROPLESS, shape, moejax.dropless, route=route),
        ]
        active = [one._replace(flops=round(one.flops * (1 - sparsity))) for one in contenders]
        sizes = shape._asdict() | {"sparsity": sparsity}
        yield Result("relu", sizes, measure(active, rounds), {})


def relu_of_sparsity(sparsity: float, logits: jax.Array) -> moejax.Routing:
    """`relu` of logits shifted so that this share of them is negative and their gates are zero."""
    return moejax.relu(logits - jax.lax.stop_gradient(jnp.quantile(logits, sparsity)))
