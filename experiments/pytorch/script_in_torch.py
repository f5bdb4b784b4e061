"""A training as a PyTorch user's script, in a process of its own: a line for each result.

    python -m pytorch.script_in_torch FOLDER EPOCHS NUMBER soft indexed eager

FOLDER has the inputs and labels, x.npy and y.npy. NUMBER is how many examples a batch has; for the
toy, how many steps an epoch has. The last three are a `Way`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from pytorch.batches import BATCHES
from pytorch.recipes import STUDIES


def main(folder: str, epochs: str, number: str, name: str, way: str, eager: str) -> None:
    """Trains, and says the loss of the last batch after every epoch."""
    inputs, labels = (torch.from_numpy(np.load(f"{folder}/{leaf}.npy")) for leaf in "xy")
    study = STUDIES[name]
    torch.manual_seed(0)
    model = study.model().eval()  # without noise
    optimizer = study.optimizer(model.parameters())
    predict = model if eager == "eager" else torch.compile(model)
    batches = BATCHES[way](inputs, labels, int(number))
    for epoch in range(int(epochs)):
        for x, y in batches():
            optimizer.zero_grad()
            loss = study.loss(predict(x), y)
            loss.backward()
            optimizer.step()
        print(epoch + 1, loss.item(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
