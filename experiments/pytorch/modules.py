"""The models of the two studies as a PyTorch user writes them: what moejax is compared with.

Every module returns what its moejax counterpart returns first: outputs or logits of shape [T, O].
Models only; `compare_pytorch.py` trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Widths = tuple[int, int, int]  # of a network: inputs, hidden, classes
DIGITS = (784, 128, 10)


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


def run_experts(
    experts: Iterable[Callable[[Tensor], Tensor]], x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Loops over the experts and adds each one's rows, weighted: chosen, weights [T, K]."""
    outputs, tokens = [], []
    for e, expert in enumerate(experts):
        token, choice = torch.where(chosen == e)
        outputs.append(weights[token, choice].unsqueeze(-1) * expert(x[token]))
        tokens.append(token)
    rows = torch.cat(outputs)  # [T K, O], sorted by expert
    return rows.new_zeros(len(x), rows.shape[-1]).index_add(0, torch.cat(tokens), rows)


def toy() -> SoftMixture:
    """Two linear experts and a 2-4-2 gate; the sigmoid of its output is the probability."""
    return SoftMixture(mlp(2, 4, 2), [nn.Linear(2, 1) for _ in range(2)])


def dense(widths: Widths = (784, 50, 10)) -> nn.Sequential:
    """One network."""
    return mlp(*widths)


def soft(num_experts: int = 8, widths: Widths = DIGITS) -> SoftMixture:
    """A linear gate over networks."""
    return SoftMixture(nn.Linear(widths[0], num_experts), networks(num_experts, widths))


def sparse(num_experts: int = 8, widths: Widths = DIGITS, k: int = 2) -> TopKMixture:
    """The noisy top-k mixture of the same networks."""
    gate, noise = nn.Linear(widths[0], num_experts), nn.Linear(widths[0], num_experts)
    return TopKMixture(gate, noise, networks(num_experts, widths), k)


def hard(num_experts: int = 8, widths: Widths = DIGITS) -> HardMixture:
    """One network per input."""
    return HardMixture(nn.Linear(widths[0], num_experts), networks(num_experts, widths))


def networks(num_experts: int, widths: Widths) -> list[nn.Module]:
    """The experts."""
    return [mlp(*widths) for _ in range(num_experts)]
