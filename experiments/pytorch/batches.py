"""The ways in which a PyTorch user goes through the data: each call gives an epoch's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def repeated(inputs: Tensor, labels: Tensor, steps: int) -> Batches:
    """All examples in every step."""
    return lambda: iter([(inputs, labels)] * steps)


def loaded(inputs: Tensor, labels: Tensor, batch_size: int) -> Batches:
    """Shuffled batches from a DataLoader."""
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, shuffle=True)
    return lambda: iter(loader)


def indexed(inputs: Tensor, labels: Tensor, batch_size: int) -> Batches:
    """Shuffled batches by indexing."""

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(inputs)).split(batch_size):
            yield inputs[rows], labels[rows]

    return shuffled


BATCHES = {"repeated": repeated, "loaded": loaded, "indexed": indexed}  # (x, y, number) -> Batches
