"""Ma et al.'s study: the loss of three models against the correlation of two tasks.

Sizes are the paper's: inputs of 100, eight experts of 16 units, towers of 8, and a shared bottom of
as many parameters as experts and towers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import moejax
from moejax.training import init_state, train_step
from studies.many_tasks_data import WIDTH, Batch, batch, weights
from studies.many_tasks_models import multi_gate, shared_bottom

TASKS, EXPERTS, HIDDEN, TOWER = 2, 8, 16, 8
BOTTOM = 113  # units: (100 * 16 * 8 + 16 * 8 * 2) / (100 + 8 * 2)
TESTED = 4096  # fresh examples
POINTS = 50  # of the curve


def relu_layer(d_in: int, d_out: int) -> moejax.Layer:
    """``relu(x W + b)``."""
    layer = moejax.linear(d_in, d_out)
    return moejax.Layer(layer.init, lambda params, x: jax.nn.relu(layer.apply(params, x)))


def gated(num_gates: int) -> moejax.Layer:
    """Eight experts behind as many gates as asked for."""
    return multi_gate(
        relu_layer(WIDTH, HIDDEN),
        moejax.linear(WIDTH, EXPERTS, bias=False),
        moejax.mlp(HIDDEN, TOWER, 1),
        num_experts=EXPERTS,
        num_tasks=TASKS,
        num_gates=num_gates,
    )


MODELS = {
    "shared-bottom": shared_bottom(
        relu_layer(WIDTH, BOTTOM), moejax.mlp(BOTTOM, TOWER, 1), num_tasks=TASKS
    ),
    "one-gate": gated(1),
    "multi-gate": gated(TASKS),
}


def squared_error(model: moejax.Layer, params: Any, data: Batch) -> jax.Array:
    """The mean squared error over both tasks."""
    return jnp.mean((model.apply(params, data.x)[..., 0] - data.y) ** 2)


def train(
    key: jax.Array,
    correlation: jax.Array,
    rate: jax.Array,
    *,
    model: moejax.Layer,
    steps: int,
    batch_size: int,
) -> dict[str, jax.Array]:
    """Trains on fresh examples by Adam, for a multiple of `POINTS` steps.

    Returns:
        The test ``loss``, and the training loss as a ``curve`` of `POINTS` means.
    """
    weights_key, init_key, run_key, test_key = jax.random.split(key, 4)
    both = weights(weights_key, correlation)
    optimizer = optax.adam(rate)

    def objective(
        params: Any, key: jax.Array, _: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return squared_error(model, params, batch(key, both, batch_size)), {}

    step = train_step(objective, optimizer)
    state = init_state(model.init(init_key), optimizer, run_key)
    state, metrics = jax.lax.scan(step, state, jax.random.split(run_key, steps))
    curve = metrics["loss"].reshape(POINTS, -1).mean(axis=1)
    test = batch(test_key, both, TESTED)
    return {"loss": squared_error(model, state.params, test), "curve": curve}
