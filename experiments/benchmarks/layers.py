"""The problems with one layer: against its peers, its grouped product, and its scaling."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from benchmarks.peers import Shape, one_hot, ragged_dot, torch_layers
from benchmarks.timing import BACKWARD, FORWARD, Contender, Result, both_modes, measure

OPERATIONS = 10**12  # forward; a peer that needs more is left out
SHAPES = [
    Shape(T=4096, D=512, F=1024, E=8, K=2),
    Shape(T=4096, D=256, F=512, E=64, K=2),
    Shape(T=4096, D=256, F=512, E=128, K=8),
    Shape(T=16, D=256, F=512, E=64, K=2),
    Shape(T=1, D=256, F=512, E=64, K=2),
]
QUICK = [Shape(T=256, D=32, F=64, E=4, K=2)]
BY_EXPERTS = [Shape(T=4096, D=256, F=512, E=2**n, K=2) for n in range(3, 9)]
BY_TOKENS = [Shape(T=4**n, D=256, F=512, E=64, K=2) for n in range(8)]
DROPLESS = "dropless"
GROUPED_MM = "transformers grouped_mm"


def layer_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """A layer of GLU experts with its router against every peer, and under other routing."""
    for shape in QUICK if quick else SHAPES:
        schedules, skipped = all_schedules(shape)
        contenders = [
            one for name, run in schedules.items() for one in layer_contenders(name, shape, run)
        ]
        for name, chosen in {"balanced": balanced(shape), "collapsed": collapsed(shape)}.items():
            route = partial(forced, shape, chosen)
            contenders += layer_contenders(
                f"{DROPLESS}, {name}", shape, moejax.dropless, route=route
            )
        peers, missing = torch_contenders(shape)
        records = measure([*contenders, *products_alone(shape), *peers], rounds)
        yield Result("layer", shape._asdict(), records, skipped | missing)


def scaling_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """The same layer for more and more experts, and for more and more tokens."""
    both = dict.fromkeys([*BY_EXPERTS, *BY_TOKENS])  # they share a shape
    for shape in QUICK if quick else both:
        contenders = [
            one
            for name, run in own_schedules().items()
            for one in layer_contenders(name, shape, run)
        ]
        peers, missing = torch_contenders(shape)
        peers = [one for one in peers if one.name == GROUPED_MM]
        yield Result("scaling", shape._asdict(), measure([*contenders, *peers], rounds), missing)


def grouped_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """One product with a kernel per group, for random group sizes."""
    for shape in QUICK if quick else SHAPES:
        rows = shape.T * shape.K
        keys = jax.random.split(jax.random.key(0), 3)
        groups = jax.random.randint(keys[0], (rows,), 0, shape.E)
        sizes = jnp.bincount(groups, length=shape.E).astype(jnp.int32)
        x = jax.random.normal(keys[1], (rows, shape.D))
        kernel = jax.random.normal(keys[2], (shape.E, shape.D, shape.F))
        products: dict[str, Callable[..., jax.Array]] = {
            "grouped_matmul": moejax.grouped_matmul,
            "loop over experts": partial(loop_over_experts, tuple(sizes.tolist())),
        }
        skipped = too_much({"ragged_dot": shape.flops * shape.E // 3})
        if not skipped:
            products["ragged_dot"] = jax.lax.ragged_dot
        contenders = [
            one
            for name, product in products.items()
            for one in both_modes(
                name, closing_over(product, sizes), (x, kernel), flops=shape.flops // 3
            )
        ]
        yield Result("grouped", shape._asdict(), measure(contenders, rounds), skipped)


def loop_over_experts(
    known: tuple[int, ...], x: jax.Array, kernel: jax.Array, sizes: jax.Array
) -> jax.Array:
    """The plain loop, with the advantage that group sizes are known when it compiles."""
    ends = np.cumsum(known)
    groups = zip(ends - known, ends, kernel, strict=True)
    return jnp.concatenate([x[start:end] @ own for start, end, own in groups])


def closing_over(
    product: Callable[..., jax.Array], sizes: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product as a function of its differentiable operands."""
    return lambda x, kernel: product(x, kernel, sizes)


def own_schedules() -> dict[str, Callable[..., jax.Array]]:
    """The sparse schedules of moejax."""
    return {DROPLESS: moejax.dropless, "capacity 1.0": partial(moejax.capacity, factor=1.0)}


def all_schedules(shape: Shape) -> tuple[dict[str, Callable[..., jax.Array]], dict[str, str]]:
    """The schedules that finish in reasonable time at this size, and what the others would take."""
    peers: dict[str, Callable[..., jax.Array]] = {
        "dense": moejax.dense,
        "ragged_dot": ragged_dot,
        "one-hot": one_hot,
    }
    skipped = too_much(
        {
            "dense": shape.flops * shape.E // shape.K,
            "ragged_dot": shape.flops * shape.E,
            "one-hot": shape.flops + 4 * shape.T**2 * shape.K * shape.D,
        }
    )
    kept = {name: run for name, run in peers.items() if name not in skipped}
    return own_schedules() | kept, skipped


def too_much(operations: dict[str, int]) -> dict[str, str]:
    """The peers that compute so much more than the active experts that they are left out."""
    return {
        name: f"{flops / 1e12:.1f}e12 operations forward"
        for name, flops in operations.items()
        if flops > OPERATIONS
    }


def layer_contenders(
    name: str,
    shape: Shape,
    execute: Callable[..., jax.Array],
    *,
    route: Callable[..., moejax.Routing] | None = None,
) -> list[Contender]:
    """The layer with this schedule, on random tokens."""
    layer = sparse_layer(shape, execute, route=route)
    args = (layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), shape[:2]))
    apply = lambda params, x: layer.apply(params, x)[0]  # noqa: E731
    return both_modes(name, apply, args, flops=shape.flops, bytes=shape.weight_bytes)


def sparse_layer(
    shape: Shape,
    execute: Callable[..., jax.Array],
    *,
    route: Callable[..., moejax.Routing] | None = None,
) -> moejax.Layer:
    """GLU experts with their router, top-k unless another rule is given."""
    return moejax.moe(
        moejax.glu(shape.D, shape.F),
        moejax.linear(shape.D, shape.E, bias=False),
        num_experts=shape.E,
        route=route or partial(moejax.top_k, k=shape.K),
        execute=execute,
    )


def products_alone(shape: Shape) -> list[Contender]:
    """The experts on equal numbers of rows in one batched pass: nothing is routed or blended."""
    expert = moejax.glu(shape.D, shape.F)
    rows = max(1, shape.T * shape.K // shape.E)
    args = (
        moejax.stack(expert, shape.E).init(jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (shape.E, rows, shape.D)),
    )
    flops = shape.flops * shape.E * rows // (shape.T * shape.K)
    return both_modes("products alone", jax.vmap(expert.apply), args, flops=flops)


def forced(shape: Shape, chosen: jax.Array, logits: jax.Array) -> moejax.Routing:
    """Top-k with logits raised far enough that the tokens go to the chosen experts [T, K]."""
    raised = 100 * jax.nn.one_hot(chosen, shape.E, dtype=logits.dtype).sum(1)  # [T, E]
    return moejax.top_k(logits + raised, k=shape.K)


def balanced(shape: Shape) -> jax.Array:
    """Every expert gets as many choices as any other, [T, K]."""
    return jnp.arange(shape.T * shape.K).reshape(shape.T, shape.K) % shape.E


def collapsed(shape: Shape) -> jax.Array:
    """Every token goes to the same K experts, [T, K]."""
    return jnp.tile(jnp.arange(shape.K), (shape.T, 1))


def torch_contenders(shape: Shape) -> tuple[list[Contender], dict[str, str]]:
    """The peers in PyTorch, or why they are missing."""
    if not torch_is_there():
        return [], {"torch": 'not installed: pip install -e ".[bench]"'}
    contenders = [
        Contender(name, partial(run, back), mode, flops=flops, bytes=shape.weight_bytes)
        for name, run in torch_layers(shape).items()
        for back, mode, flops in [
            (False, FORWARD, shape.flops),
            (True, BACKWARD, 3 * shape.flops),
        ]
    ]
    return contenders, {}


def torch_is_there() -> bool:
    """Whether the peers in PyTorch can run."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
