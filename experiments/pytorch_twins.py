"""The models of the two studies in both frameworks, and the same run in each.

A run starts from PyTorch's weights and takes the same batches in the same order. What it leaves is
compared under PyTorch's names, so the conversion is part of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytorch_baseline
import torch
import toy
from torch import Tensor, nn
from torch.nn import functional as F

import moejax
from moejax import conversion
from moejax.training import init_state, scan_batches, train_step


class Twin(NamedTuple):
    """One model with its loss and optimizer, in both frameworks.

    Attributes:
        torch_model: makes the module.
        torch_loss: ``(module's output, labels) -> scalar``.
        torch_optimizer: ``parameters -> optimizer``.
        apply: ``(params, x) -> output``, the same function in moejax.
        loss: ``(output, labels) -> scalar``.
        optimizer: the same in optax.
        layout: leads from the module's state_dict to the params.
    """

    torch_model: Callable[[], nn.Module]
    torch_loss: Callable[[Tensor, Tensor], Tensor]
    torch_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    apply: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    layout: conversion.Layout


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


def toy_twin() -> Twin:
    """Two linear experts with a 2-4-2 gate, squared error, Adam."""
    layer = toy.mixture(2)
    return Twin(
        pytorch_baseline.toy,
        lambda score, y: F.mse_loss(torch.sigmoid(score[:, 0]), y),
        partial(torch.optim.Adam, lr=toy.LEARNING_RATE),
        lambda params, x: layer.apply(params, x)[0],
        lambda score, y: jnp.mean((jax.nn.sigmoid(score[:, 0]) - y) ** 2),
        optax.adam(toy.LEARNING_RATE),
        conversion.moe(conversion.linear(2, 1), conversion.mlp(2, 4, 2), num_experts=2),
    )


def dense_twin(hidden: int = 50) -> Twin:
    """784-hidden-10 with plain SGD."""
    return classifier(
        partial(pytorch_baseline.dense, hidden),
        partial(torch.optim.SGD, lr=0.1),
        moejax.mlp(784, hidden, 10).apply,
        optax.sgd(0.1),
        conversion.mlp(784, hidden, 10),
    )


def soft_twin(num_experts: int = 8, hidden: int = 128) -> Twin:
    """Every expert runs and the gate blends; Adam."""
    layer = moejax.moe(
        moejax.mlp(784, hidden, 10), moejax.linear(784, num_experts), num_experts=num_experts
    )
    layout = conversion.moe(
        conversion.mlp(784, hidden, 10),
        conversion.linear(784, num_experts),
        num_experts=num_experts,
    )
    return classifier(
        partial(pytorch_baseline.soft, num_experts, hidden),
        partial(torch.optim.Adam, lr=1e-3),
        lambda params, x: layer.apply(params, x)[0],
        optax.adam(1e-3),
        layout,
    )


def sparse_twin(num_experts: int = 8, hidden: int = 128, k: int = 2) -> Twin:
    """Noisy top-k with the noise off; Adam."""
    router = moejax.linear(784, num_experts)
    layer = moejax.moe(
        moejax.mlp(784, hidden, 10),
        moejax.noisy(router, router),
        num_experts=num_experts,
        route=partial(moejax.noisy_top_k, k=k),
    )
    gate = conversion.linear(784, num_experts)
    experts = conversion.stack(conversion.mlp(784, hidden, 10), num_experts)
    layout = {
        "router": {"router": conversion.at("gate", gate), "noise": conversion.at("noise", gate)},
        "experts": conversion.at("experts", experts),
    }
    return classifier(
        partial(pytorch_baseline.sparse, num_experts, hidden, k),
        partial(torch.optim.Adam, lr=1e-3),
        lambda params, x: layer.apply(params, x)[0],
        optax.adam(1e-3),
        layout,
    )


def classifier(
    torch_model: Callable[[], nn.Module],
    torch_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    apply: Callable[[Any, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    layout: conversion.Layout,
) -> Twin:
    """A twin that minimises the mean cross-entropy."""
    return Twin(
        torch_model,
        F.cross_entropy,
        torch_optimizer,
        apply,
        lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(),
        optimizer,
        layout,
    )


TWINS = {"toy": toy_twin, "dense": dense_twin, "soft": soft_twin, "sparse": sparse_twin}


def initial_state(twin: Twin, seed: int) -> dict[str, np.ndarray]:
    """The weights that PyTorch starts from."""
    torch.manual_seed(seed)
    return to_numpy(twin.torch_model().state_dict())


def run_torch(
    twin: Twin, state_dict: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, order: np.ndarray
) -> Trace:
    """A run in PyTorch, in the dtype of x; order holds the rows of each step, [S, B]."""
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    model = torch_model(twin, state_dict, inputs.dtype)
    optimizer = twin.torch_optimizer(model.parameters())
    losses: list[float] = []
    for rows in torch.from_numpy(order):
        optimizer.zero_grad()
        outputs = model(inputs[rows])
        loss = twin.torch_loss(outputs, labels[rows])
        loss.backward()
        if not losses:
            first, gradients = outputs.detach().numpy().copy(), gradients_of(model)
        optimizer.step()
        losses.append(loss.item())
    return Trace(first, gradients, np.array(losses), to_numpy(model.state_dict()))


def torch_model(twin: Twin, state_dict: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    """The module with these weights, its noise off."""
    model = twin.torch_model().to(dtype).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})
    return model


def gradients_of(model: nn.Module) -> dict[str, np.ndarray]:
    """A gradient for every parameter: zero where backward did not reach, as in JAX."""
    return to_numpy(
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
    )


def to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies, because PyTorch's optimizers write in place."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def run_moejax(
    twin: Twin, state_dict: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, order: np.ndarray
) -> Trace:
    """The same run in moejax, in the dtype of x."""
    with jax.enable_x64(x.dtype == np.float64):
        params = conversion.from_torch(twin.layout, state_dict)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(x.dtype)), params)
        data = jnp.asarray(x), jnp.asarray(y)
        result = jax.jit(partial(trace, twin))(params, data, jnp.asarray(order))
        outputs, gradients, losses, parameters = jax.device_get(result)
    to_torch = partial(conversion.to_torch, twin.layout)
    return Trace(outputs, to_torch(gradients), losses, to_torch(parameters))


def trace(twin: Twin, params: Any, data: tuple[jax.Array, ...], order: jax.Array) -> tuple:
    """A run as a pure function: a `Trace` of which gradients and parameters are still pytrees."""
    x, y = (leaf[order[0]] for leaf in data)
    gradients = jax.grad(lambda p: twin.loss(twin.apply(p, x), y))(params)
    state = init_state(params, twin.optimizer, jax.random.key(0))
    step = train_step(partial(objective, twin), twin.optimizer)
    state, metrics = scan_batches(step, state, data, order)
    return twin.apply(params, x), gradients, metrics["loss"], state.params


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
