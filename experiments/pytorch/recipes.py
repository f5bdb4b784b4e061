"""The studies as a PyTorch user writes them: module, loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pytorch import language_model, modules


class Study(NamedTuple):
    """A module with its loss and optimizer.

    Attributes:
        model: makes the module.
        loss: ``(output, labels) -> scalar``.
        optimizer: ``parameters -> optimizer``.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """The mean squared error between the sigmoid of the output [N, 1] and the label [N]."""
    return F.mse_loss(torch.sigmoid(output[:, 0]), y)


adam = partial(torch.optim.Adam, lr=1e-3)
STUDIES = {
    "toy": Study(modules.toy, squared_error, partial(torch.optim.Adam, lr=0.01)),
    "dense": Study(modules.dense, F.cross_entropy, partial(torch.optim.SGD, lr=0.1)),
    "soft": Study(modules.soft, F.cross_entropy, adam),
    "sparse": Study(modules.sparse, F.cross_entropy, adam),
    "hard": Study(modules.hard, F.cross_entropy, adam),
    "language": Study(language_model.sparse, language_model.cross_entropy, adam),
    "language_grouped": Study(
        partial(language_model.sparse, run=language_model.grouped),
        language_model.cross_entropy,
        adam,
    ),
}
