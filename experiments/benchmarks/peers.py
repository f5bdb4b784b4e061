"""Other ways to compute the same layer, for comparison: in JAX, and in PyTorch if it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax
from parts.records import cores


class Shape(NamedTuple):
    """Sizes of one problem: tokens, widths, experts and experts per token."""

    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Operations of the three products of a GLU, over the active experts, forward."""
        return 6 * self.T * self.K * self.D * self.F

    @property
    def weight_bytes(self) -> int:
        """Size of the experts that can be active, in float32."""
        return 12 * min(self.E, self.T * self.K) * self.D * self.F


def ragged_dot(
    expert: Callable[..., jax.Array], params: Any, x: jax.Array, routing: moejax.Routing
) -> jax.Array:
    """Tokens sorted by expert, the layer's products by ``jax.lax.ragged_dot``, scattered back."""
    experts = routing.experts.reshape(-1)  # [T * K]
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=routing.num_experts).astype(jnp.int32)
    token = order // routing.experts.shape[1]
    y = expert(params, x[token], matmul=lambda x, kernel: jax.lax.ragged_dot(x, kernel, sizes))
    weights = routing.weights.reshape(-1)[order]
    return jnp.zeros_like(x).at[token].add(weights[:, None] * y)


def one_hot(
    expert: Callable[..., jax.Array], params: Any, x: jax.Array, routing: moejax.Routing
) -> jax.Array:
    """The einsum dispatch of GShard: [T, E, C] masks, with capacity for the mean load."""
    tokens, k = routing.experts.shape
    capacity = -(-tokens * k // routing.num_experts)
    chosen = jax.nn.one_hot(routing.experts, routing.num_experts, dtype=jnp.int32).sum(1)  # [T, E]
    position = jnp.where(chosen == 1, jnp.cumsum(chosen, axis=0) - 1, capacity)
    mask = jax.nn.one_hot(position, capacity, dtype=x.dtype)  # [T, E, C]
    rows = jnp.einsum("tec,td->ecd", mask, x)
    combine = mask * routing.gates[..., None]
    return jnp.einsum("tec,ecd->td", combine, jax.vmap(expert)(params, rows))


def gathered(
    expert: Callable[..., jax.Array], params: Any, x: jax.Array, routing: moejax.Routing
) -> jax.Array:
    """Gathers the weights of every token's experts, for one small product per choice."""
    chosen = jax.tree.map(lambda a: a[routing.experts], params)  # [T, K, ...]
    per_choice = jax.vmap(jax.vmap(expert, in_axes=(0, None)))
    outputs = per_choice(chosen, x[:, None])[:, :, 0]  # [T, K, D]
    return jnp.einsum("tk,tkd->td", routing.weights, outputs)


def torch_layers(shape: Shape) -> dict[str, Callable[[bool], None]]:
    """Mixtral's block in PyTorch: transformers' eager and grouped_mm, and a loop over experts.

    Each function runs its block once: forward, or forward and backward if told so.
    """
    import torch

    torch.set_num_threads(cores())  # as XLA does
    x = torch.randn(1, shape.T, shape.D, requires_grad=True)
    cotangent = torch.randn(1, shape.T, shape.D)

    def runner(module: torch.nn.Module) -> Callable[[bool], None]:
        leaves = [x, *module.parameters()]

        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                y = module(x)
            if backward:
                torch.autograd.grad(y, leaves, cotangent)

        return run

    layers = {name: torch_block(shape, name) for name in ("eager", "grouped_mm")}
    named = {f"transformers {name}": runner(layer) for name, layer in layers.items()}
    return named | {"torch loop": runner(torch_loop(shape))}


def torch_step(shape: Shape, learning_rate: float) -> Callable[[], None]:
    """Mixtral's block with grouped products: forward, backward and one fused update of Adam."""
    import torch

    torch.set_num_threads(cores())
    block = torch_block(shape, "grouped_mm")
    optimizer = torch.optim.Adam(block.parameters(), lr=learning_rate, fused=True)
    x = torch.randn(1, shape.T, shape.D)

    def run() -> None:
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()

    return run


def torch_block(shape: Shape, implementation: str) -> Any:
    """Mixtral's block in PyTorch, its experts computed by this implementation of transformers."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
    )
    config._experts_implementation = implementation
    module = MixtralSparseMoeBlock(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def torch_loop(shape: Shape) -> Any:
    """A list of expert modules, and a loop over them with boolean masks, as tutorials write it."""
    import torch

    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(shape.D, shape.F, bias=False)
            self.up = torch.nn.Linear(shape.D, shape.F, bias=False)
            self.down = torch.nn.Linear(shape.F, shape.D, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = torch.nn.Linear(shape.D, shape.E, bias=False)
            self.experts = torch.nn.ModuleList(Expert() for _ in range(shape.E))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(-1, shape.D)
            weights, chosen = self.router(x).softmax(-1).topk(shape.K)
            weights = weights / weights.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                gates = (weights * (chosen == e)).sum(-1)  # [T]
                mask = (chosen == e).any(-1)
                y[mask] = y[mask] + gates[mask, None] * expert(x[mask])
            return y.reshape(1, shape.T, shape.D)

    return Loop()
