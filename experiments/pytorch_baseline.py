"""The models of the two studies as a PyTorch user writes them: what moejax is compared with.

Every module returns what its moejax counterpart returns first: scores or logits of shape [T, O].
Models only; `compare_pytorch.py` trains them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SoftMixture(nn.Module):
    """Every expert runs on every token; the softmax of the gate blends them."""

    def __init__(self, gate: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """The blend [T, O] of tokens [T, D]."""
        gates = self.gate(x).softmax(dim=-1)  # [T, E]
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [T, E, O]
        return (gates.unsqueeze(-1) * outputs).sum(dim=1)


class TopKMixture(nn.Module):
    """Noisy top-k: every token goes to its k best experts, each of which sees only its own rows."""

    def __init__(
        self, gate: nn.Module, noise: nn.Module | None, experts: list[nn.Module], k: int
    ) -> None:
        super().__init__()
        self.gate = gate
        self.noise = noise
        self.experts = nn.ModuleList(experts)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """The blend [T, O] of tokens [T, D]; noisy in training mode only."""
        logits = self.gate(x)  # [T, E]
        if self.training and self.noise is not None:
            logits = logits + torch.randn_like(logits) * (F.softplus(self.noise(x)) + 1e-2)
        kept, chosen = logits.topk(self.k, dim=-1)  # [T, K]
        return run_experts(self.experts, x, chosen, kept.softmax(dim=-1))


class HardMixture(nn.Module):
    """Every token goes to its best expert, weighted by its probability."""

    def __init__(self, gate: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """The chosen expert's weighted output [T, O] for tokens [T, D]."""
        weights, chosen = self.gate(x).softmax(dim=-1).max(dim=-1, keepdim=True)  # [T, 1]
        return run_experts(self.experts, x, chosen, weights)


def run_experts(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Loops over the experts and adds each one's rows, weighted: chosen, weights [T, K]."""
    outputs, tokens = [], []
    for e, expert in enumerate(experts):
        token, choice = torch.where(chosen == e)
        outputs.append(weights[token, choice].unsqueeze(-1) * expert(x[token]))
        tokens.append(token)
    rows = torch.cat(outputs)  # [T K, O], sorted by expert
    return rows.new_zeros(len(x), rows.shape[-1]).index_add(0, torch.cat(tokens), rows)


def toy() -> SoftMixture:
    """Two linear experts and a 2-4-2 gate; the sigmoid of its score is the probability."""
    return SoftMixture(mlp(2, 4, 2), [nn.Linear(2, 1) for _ in range(2)])


def dense(hidden: int = 50) -> nn.Sequential:
    """The network 784-hidden-10."""
    return mlp(784, hidden, 10)


def soft(num_experts: int = 8, hidden: int = 128) -> SoftMixture:
    """A linear gate over experts of 784-hidden-10."""
    return SoftMixture(nn.Linear(784, num_experts), digit_experts(num_experts, hidden))


def sparse(num_experts: int = 8, hidden: int = 128, k: int = 2) -> TopKMixture:
    """The noisy top-k mixture of the same experts."""
    gate, noise = nn.Linear(784, num_experts), nn.Linear(784, num_experts)
    return TopKMixture(gate, noise, digit_experts(num_experts, hidden), k)


def hard(num_experts: int = 8, hidden: int = 128) -> HardMixture:
    """One expert per image."""
    return HardMixture(nn.Linear(784, num_experts), digit_experts(num_experts, hidden))


def digit_experts(num_experts: int, hidden: int) -> list[nn.Module]:
    """Experts of 784-hidden-10."""
    return [mlp(784, hidden, 10) for _ in range(num_experts)]
