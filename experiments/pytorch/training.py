"""The usual training loop in PyTorch: the other half of a comparison with moejax."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pytorch.recipes import Study
from pytorch.twins import Problem, Trace


def initial_state(study: Study, seed: int) -> dict[str, np.ndarray]:
    """The weights that PyTorch starts from."""
    torch.manual_seed(seed)
    return to_numpy(study.model().state_dict())


def run_torch(
    study: Study, state_dict: dict[str, np.ndarray], problem: Problem, dtype: type
) -> Trace:
    """A run in PyTorch, in this precision."""
    inputs, labels, order = map(torch.from_numpy, problem.astype(dtype))
    model = with_weights(study, state_dict, getattr(torch, np.dtype(dtype).name))
    optimizer = study.optimizer(model.parameters())
    losses: list[float] = []
    for rows in order:
        optimizer.zero_grad()
        outputs = model(inputs[rows])
        loss = study.loss(outputs, labels[rows])
        loss.backward()
        if not losses:
            first, gradients = outputs.detach().numpy().copy(), gradients_of(model)
        optimizer.step()
        losses.append(loss.item())
    return Trace(first, gradients, np.array(losses), to_numpy(model.state_dict()))


def with_weights(study: Study, state_dict: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    """The module with these weights, its noise off."""
    model = study.model().to(dtype).eval()
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
