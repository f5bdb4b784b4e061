"""The models of the two studies in moejax, each with what its twin in PyTorch needs to follow it.

A run starts from PyTorch's weights and takes given batches in a given order. What it leaves is
kept under PyTorch's names, so the conversion is part of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
import toy
from moejax.interop import torch as conversion
from moejax.training import Step, TrainState, init_state, scan_batches, train_step

Widths = tuple[int, int, int]  # of a network: inputs, hidden, classes
DIGITS = (784, 128, 10)


class Twin(NamedTuple):
    """A model with its loss and optimizer.

    Attributes:
        init: ``key -> params``.
        apply: ``(params, x) -> output``.
        loss: ``(output, labels) -> scalar``.
        optimizer: an optax optimizer.
        layout: leads from the state_dict of the PyTorch module to the params.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    layout: conversion.Layout


class Problem(NamedTuple):
    """Data as both frameworks take it.

    Attributes:
        x: inputs, shape [N, D]: numbers, or characters as integers.
        y: labels, shape [N]: probabilities, or classes; for characters [N, D].
        order: the rows of each step's batch, shape [S, B].
    """

    x: np.ndarray
    y: np.ndarray
    order: np.ndarray

    def astype(self, dtype: type) -> Problem:
        """The same problem in another precision; integers stay what they are."""
        x, y = (leaf if leaf.dtype.kind == "i" else leaf.astype(dtype) for leaf in self[:2])
        return Problem(x, y, self.order)


class Trace(NamedTuple):
    """What a run leaves, as NumPy arrays under PyTorch's names.

    Attributes:
        outputs: of the first batch before training, [B, O].
        gradients: of the first step, by name.
        losses: of every step, [S].
        parameters: after the last step, by name.
    """

    outputs: np.ndarray
    gradients: dict[str, np.ndarray]
    losses: np.ndarray
    parameters: dict[str, np.ndarray]


def toy_mixture() -> Twin:
    """Two linear experts with a 2-4-2 gate, squared error, Adam."""
    layer = toy.mixture(2)
    return Twin(
        layer.init,
        lambda params, x: layer.apply(params, x)[0],
        lambda output, y: jnp.mean((jax.nn.sigmoid(output[:, 0]) - y) ** 2),
        optax.adam(toy.LEARNING_RATE),
        conversion.moe(conversion.linear(2, 1), conversion.mlp(2, 4, 2), num_experts=2),
    )


def dense(widths: Widths = (784, 50, 10)) -> Twin:
    """One network, plain SGD."""
    layer = moejax.mlp(*widths)
    return Twin(*layer, cross_entropy, optax.sgd(0.1), conversion.mlp(*widths))


def soft(num_experts: int = 8, widths: Widths = DIGITS) -> Twin:
    """Every expert runs and the gate blends; Adam."""
    return mixture(num_experts, widths, moejax.softmax)


def sparse(num_experts: int = 8, widths: Widths = DIGITS, k: int = 2) -> Twin:
    """Noisy top-k with the noise off; Adam."""
    router = moejax.linear(widths[0], num_experts)
    layer = moejax.moe(
        moejax.mlp(*widths),
        moejax.noisy(router, router),
        num_experts=num_experts,
        route=partial(moejax.noisy_top_k, k=k),
    )
    gate = conversion.linear(widths[0], num_experts)
    layout = {
        "router": {"router": conversion.at("gate", gate), "noise": conversion.at("noise", gate)},
        "experts": conversion.at("experts", conversion.stack(conversion.mlp(*widths), num_experts)),
    }
    return Twin(
        layer.init,
        lambda params, x: layer.apply(params, x)[0],
        cross_entropy,
        optax.adam(1e-3),
        layout,
    )


def hard(num_experts: int = 8, widths: Widths = DIGITS) -> Twin:
    """One expert per input; Adam."""
    return mixture(num_experts, widths, moejax.switch)


def mixture(num_experts: int, widths: Widths, route: Callable[..., moejax.Routing]) -> Twin:
    """A linear gate over networks; Adam."""
    gate = moejax.linear(widths[0], num_experts)
    layer = moejax.moe(moejax.mlp(*widths), gate, num_experts=num_experts, route=route)
    return Twin(
        layer.init,
        lambda params, x: layer.apply(params, x)[0],
        cross_entropy,
        optax.adam(1e-3),
        conversion.moe(
            conversion.mlp(*widths),
            conversion.linear(widths[0], num_experts),
            num_experts=num_experts,
        ),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def language() -> Twin:
    """The sparse language model; Adam."""
    from pytorch import language_twin  # loads flax, for which no other twin should wait

    return language_twin.language()


TWINS = {
    "toy": toy_mixture,
    "dense": dense,
    "soft": soft,
    "sparse": sparse,
    "language": language,
}


def run_moejax(
    twin: Twin, state_dict: dict[str, np.ndarray], problem: Problem, dtype: type
) -> Trace:
    """A run in moejax from PyTorch's weights, in this precision."""
    x, y, order = problem.astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        params = conversion.from_torch(twin.layout, state_dict)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(dtype)), params)
        data = jnp.asarray(x), jnp.asarray(y)
        result = jax.jit(partial(trace, twin))(params, data, jnp.asarray(order))
        outputs, gradients, losses, parameters = jax.device_get(result)
    to_torch = partial(conversion.to_torch, twin.layout)
    return Trace(outputs, to_torch(gradients), losses, to_torch(parameters))


def trace(
    twin: Twin, params: Any, data: tuple[jax.Array, ...], order: jax.Array
) -> tuple[Any, ...]:
    """A run as a pure function: a `Trace` whose gradients and parameters are still pytrees."""
    x, y = (leaf[order[0]] for leaf in data)
    gradients = jax.grad(lambda p: twin.loss(twin.apply(p, x), y))(params)
    state = init_state(params, twin.optimizer, jax.random.key(0))
    step = train_step(partial(objective, twin), twin.optimizer)
    state, metrics = scan_batches(step, state, data, order)
    return twin.apply(params, x), gradients, metrics["loss"], state.params


def full_batches(step: Step, state: TrainState, data: Any, steps: int) -> tuple[TrainState, Any]:
    """Steps of the toy: all points in each."""
    return jax.lax.scan(lambda state, _: step(state, data), state, length=steps)


def objective(
    twin: Twin, params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The twin's loss as training wants it; without noise, so the key is not used."""
    x, y = batch
    return twin.loss(twin.apply(params, x), y), {}


def differences(one: Trace, other: Trace) -> dict[str, float]:
    """The largest absolute difference of each part of two runs."""
    return {
        "outputs": largest(one.outputs, other.outputs),
        "gradients": largest_by_name(one.gradients, other.gradients),
        "losses": largest(one.losses, other.losses),
        "parameters": largest_by_name(one.parameters, other.parameters),
    }


def largest_by_name(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest absolute difference between arrays of the same names."""
    if one.keys() != other.keys():
        raise ValueError(f"the names differ: {sorted(one.keys() ^ other.keys())}")
    return max(largest(array, other[name]) for name, array in one.items())


def largest(one: np.ndarray, other: np.ndarray) -> float:
    """The largest absolute difference, in float64."""
    if one.shape != other.shape:
        raise ValueError(f"the shapes differ: {one.shape} and {other.shape}")
    return float(np.max(np.abs(one.astype(np.float64) - other.astype(np.float64))))
