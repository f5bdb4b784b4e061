"""A training as a PyTorch user's script, in a process of its own: a line for each result.

    python -m pytorch.script_in_torch soft indexing FOLDER EPOCHS

FOLDER has the inputs and labels, x.npy and y.npy. An epoch of the toy is a hundred steps.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from pytorch.batches import Batches, indexed, loaded, repeated
from pytorch.recipes import STUDIES

BATCH_SIZE, STEPS = 128, 100


def main(name: str, way: str, folder: str, epochs: str) -> None:
    """Trains, and says the loss of the last batch after every epoch."""
    inputs, labels = (torch.from_numpy(np.load(f"{folder}/{leaf}.npy")) for leaf in "xy")
    study = STUDIES[name]
    torch.manual_seed(0)
    model = study.model().eval()  # without noise
    optimizer = study.optimizer(model.parameters())
    predict = torch.compile(model) if way == "torch.compile" else model
    batches = batches_of(name, way, inputs, labels)
    for epoch in range(int(epochs)):
        for x, y in batches():
            optimizer.zero_grad()
            loss = study.loss(predict(x), y)
            loss.backward()
            optimizer.step()
        print(epoch + 1, loss.item(), flush=True)


def batches_of(name: str, way: str, inputs: Tensor, labels: Tensor) -> Batches:
    """How this way goes through the data."""
    if name == "toy":
        return repeated(inputs, labels, STEPS)
    return (loaded if way == "DataLoader" else indexed)(inputs, labels, BATCH_SIZE)


if __name__ == "__main__":
    main(*sys.argv[1:])
