"""The language model of `language_model.py` as a PyTorch user writes it.

The sparse one: a decoder-only transformer whose feed-forward layers send every character to two of
eight experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pytorch.modules import run_experts

# (tokens [T, D], their experts [T, K], weights [T, K], kernels of gate, up and down) -> [T, D]
Run = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]
Turns = tuple[Tensor, Tensor]  # each [S, W / 2]


class Sizes(NamedTuple):
    """The sizes of the network and of its mixtures, by default those of `language_model.py`."""

    vocabulary: int = 97
    width: int = 64
    layers: int = 2
    heads: int = 4
    experts: int = 8
    k: int = 2
    hidden: int = 64


def one_by_one(x: Tensor, chosen: Tensor, weights: Tensor, kernels: list[Tensor]) -> Tensor:
    """A loop over the experts, each of which sees only its own rows."""
    experts = [partial(glu, *own) for own in zip(*kernels, strict=True)]
    return run_experts(experts, x, chosen, weights)


def glu(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """One expert."""
    return (F.silu(x @ gate) * (x @ up)) @ down


def grouped(x: Tensor, chosen: Tensor, weights: Tensor, kernels: list[Tensor]) -> Tensor:
    """All rows sorted by expert, and a grouped product for each kernel; not in float64."""
    gate, up, down = kernels
    order = chosen.flatten().argsort()
    token = order // chosen.shape[1]
    ends = chosen.flatten().bincount(minlength=len(gate)).cumsum(0).to(torch.int32)
    product = partial(F.grouped_mm, offs=ends)
    rows = x[token]
    y = product(F.silu(product(rows, gate)) * product(rows, up), down)
    return torch.zeros_like(x).index_add(0, token, weights.flatten()[order, None] * y)


class Mixture(nn.Module):
    """The k best of the experts for every token, blended by a softmax over the k."""

    def __init__(self, sizes: Sizes, run: Run) -> None:
        super().__init__()
        self.k, self.run = sizes.k, run
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        inward = sizes.experts, sizes.width, sizes.hidden
        self.gate = nn.Parameter(torch.randn(inward) * sizes.width**-0.5)
        self.up = nn.Parameter(torch.randn(inward) * sizes.width**-0.5)
        outward = sizes.experts, sizes.hidden, sizes.width
        self.down = nn.Parameter(torch.randn(outward) * sizes.hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The blend [T, D] of tokens [T, D]."""
        kept, chosen = self.router(x).topk(self.k, dim=-1)  # [T, K]
        return self.run(x, chosen, kept.softmax(dim=-1), [self.gate, self.up, self.down])


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.inward = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.outward = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, turns: Turns) -> Tensor:
        """A whole text at once, x [B, S, D]."""
        heads = self.inward(x).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, H, W]
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # [B, H, S, W]
        y = F.scaled_dot_product_attention(
            rotated(queries, turns), rotated(keys, turns), values, is_causal=True
        )
        return self.outward(y.transpose(1, 2).flatten(2))


def turns_of(tokens: int, width: int, dtype: torch.dtype) -> Turns:
    """Cosine and sine of how far the positions turn each pair of features."""
    half = width // 2
    rates = 1000.0 ** (-torch.arange(half, dtype=dtype) / half)
    angles = torch.arange(tokens, dtype=dtype)[:, None] * rates
    return angles.cos(), angles.sin()


def rotated(x: Tensor, turns: Turns) -> Tensor:
    """Rotary positions, x [B, H, S, W]."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Attention, then a mixture; each on a normalised input and added to it."""

    def __init__(self, sizes: Sizes, run: Run) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(sizes.width, eps=1e-6) for _ in range(2)])
        self.attention = Attention(sizes)
        self.mixture = Mixture(sizes, run)

    def forward(self, x: Tensor, turns: Turns) -> Tensor:
        """A whole text at once."""
        x = x + self.attention(self.norms[0](x), turns)
        return x + self.mixture(self.norms[1](x).flatten(0, 1)).view_as(x)


class Transformer(nn.Module):
    """Characters in, logits of the next character out; the embedding is the last layer, too."""

    def __init__(self, sizes: Sizes, run: Run) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        nn.init.normal_(self.embedding.weight, std=sizes.width**-0.5)
        self.blocks = nn.ModuleList([Block(sizes, run) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits [B, S, V] for characters [B, S]."""
        x = self.embedding(characters) * self.sizes.width**0.5
        turns = turns_of(x.shape[1], self.sizes.width // self.sizes.heads, x.dtype)
        for block in self.blocks:
            x = block(x, turns)
        return self.norm(x) @ self.embedding.weight.T


def sparse(sizes: Sizes = Sizes(), run: Run = one_by_one) -> Transformer:  # noqa: B008
    """The language model."""
    return Transformer(sizes, run)


def cross_entropy(logits: Tensor, characters: Tensor) -> Tensor:
    """The mean over all next characters, for logits [B, S, V] and characters [B, S]."""
    return F.cross_entropy(logits.flatten(0, 1), characters.flatten())
