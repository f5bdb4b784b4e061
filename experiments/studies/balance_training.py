"""MNIST by a layer of small experts: how quality and balance go as it trains."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import moejax
from data import Split, flat
from studies.balance_methods import EXPERTS, Method

PIXELS, HIDDEN, DIGITS = 784, 16, 10
POINTS = 20  # of the curves
BATCH, LEARNING_RATE = 128, 1e-3


class Run(NamedTuple):
    """A run under way."""

    params: Any
    opt_state: optax.OptState
    memory: Any


def layer(method: Method, memory: Any) -> moejax.Layer:
    """Eight networks 784-16-10 that a linear router chooses from, beside a linear layer."""
    mixture = moejax.moe(
        moejax.mlp(PIXELS, HIDDEN, DIGITS),
        moejax.linear(PIXELS, EXPERTS),
        num_experts=EXPERTS,
        route=method.rule(memory),
        execute=method.schedule,
    )
    return moejax.with_shared(mixture, moejax.linear(PIXELS, DIGITS))


def train(
    key: jax.Array, data: Split, test: Split, *, method: Method, steps: int
) -> dict[str, jax.Array]:
    """Trains by Adam on batches drawn with replacement.

    Args:
        key: from which the run follows.
        data: images and labels to learn from.
        test: images and labels to measure on.
        method: how the experts are balanced.
        steps: how many, a multiple of `POINTS`.

    Returns:
        Every measure of `measure` at the end, and its curve of `POINTS` as ``curve_...``.
    """
    init_key, run_key = jax.random.split(key)
    optimizer = optax.adam(LEARNING_RATE)
    params = layer(method, method.memory).init(init_key)
    run = Run(params, optimizer.init(params), method.memory)

    def step(run: Run, key: jax.Array) -> tuple[Run, None]:
        rows = jax.random.randint(key, (BATCH,), 0, len(data.labels))
        batch = jax.tree.map(lambda leaf: leaf[rows], data)
        gradient, decision = jax.grad(partial(objective, method), has_aux=True)(
            run.params, batch, run.memory
        )
        updates, opt_state = optimizer.update(gradient, run.opt_state, run.params)
        params = optax.apply_updates(run.params, updates)
        return Run(params, opt_state, method.update(run.memory, decision)), None

    def stretch(run: Run, keys: jax.Array) -> tuple[Run, dict[str, jax.Array]]:
        run, _ = jax.lax.scan(step, run, keys)
        return run, measure(method, run, test)

    keys = jax.random.split(run_key, steps).reshape(POINTS, -1)
    _, curves = jax.lax.scan(stretch, run, keys)
    last = {name: curve[-1] for name, curve in curves.items()}
    return last | {f"curve_{name}": curve for name, curve in curves.items()}


def objective(method: Method, params: Any, batch: Split, memory: Any) -> tuple[jax.Array, Any]:
    """Mean cross-entropy plus what the method adds; and the decision."""
    logits, decision = layer(method, memory).apply(params, flat(batch.images))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    return loss + method.penalty(decision, memory), decision


def measure(method: Method, run: Run, test: Split) -> dict[str, jax.Array]:
    """Quality and balance on all test images in one batch.

    Returns:
        ``error``, percent; ``cross_entropy``, nats; ``violation``, the largest load over the mean
        one, less 1 (where no image has an expert, as if one expert had them all); ``experts`` per
        image; ``left_out``, percent of the images that go to none.
    """
    logits, decision = layer(method, run.memory).apply(run.params, flat(test.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
    chosen = method.chosen(decision)
    load = chosen.mean(axis=0)  # of all images
    return {
        "error": 100 * jnp.mean(jnp.argmax(logits, axis=-1) != test.labels),
        "cross_entropy": losses.mean(),
        "violation": jnp.where(load.any(), load.max() / load.mean(), EXPERTS) - 1,
        "experts": load.sum(),
        "left_out": 100 * jnp.mean(~chosen.any(axis=1)),
    }
