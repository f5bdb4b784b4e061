"""The same training in both frameworks, as functions that run an epoch and can be timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch

from moejax.interop import torch as conversion
from moejax.interop.torch import StateDict
from moejax.training import TrainState, init_state, train_epoch, train_step
from pytorch.batches import BATCHES
from pytorch.recipes import STUDIES
from pytorch.training import with_weights
from pytorch.twins import Problem, Twin, full_batches, objective
from pytorch.ways import BATCH_SIZE, MOEJAX, Way, ways

Contender = Callable[[], Any]  # one epoch, or one run of the toy


def contenders(name: str, twin: Twin, start: StateDict, problem: Problem) -> dict[str, Contender]:
    """Every way in PyTorch, and one scan; an epoch of the toy is full-batch steps.

    Args:
        name: of the model.
        twin: the model in moejax.
        start: the weights in PyTorch.
        problem: the data, in float32.
    """
    x, y, order = problem
    number = BATCH_SIZE.get(name, len(order))
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    theirs = {
        label: torch_contender(way, start, inputs, labels, number)
        for label, way in ways(name).items()
    }
    data = jnp.asarray(x), jnp.asarray(y)
    advance = (
        partial(train_epoch, data=data, batch_size=number)
        if name in BATCH_SIZE
        else partial(full_batches, data=data, steps=number)
    )
    return theirs | {MOEJAX: moejax_contender(twin, start, advance)}


def torch_contender(
    way: Way, start: StateDict, inputs: torch.Tensor, labels: torch.Tensor, number: int
) -> Contender:
    """The usual loop; weights and optimizer go on from call to call."""
    study = STUDIES[way.study]
    batches = BATCHES[way.batches](inputs, labels, number)
    model = with_weights(study, start, torch.float32)
    optimizer = study.optimizer(model.parameters())
    predict = torch.compile(model) if way.compiled else model

    def run() -> None:
        for x, y in batches():
            optimizer.zero_grad()
            study.loss(predict(x), y).backward()
            optimizer.step()

    return run


def moejax_contender(twin: Twin, start: StateDict, advance: Callable[..., Any]) -> Contender:
    """One jitted call; the state goes on from call to call."""
    params = jax.tree.map(jnp.asarray, conversion.from_torch(twin.layout, start))
    step = train_step(partial(objective, twin), twin.optimizer)
    program = jax.jit(partial(advance, step), donate_argnums=0)
    state = init_state(params, twin.optimizer, jax.random.key(0))

    def run() -> TrainState:
        nonlocal state
        state, _ = jax.block_until_ready(program(state))
        return state

    return run
