"""Jacobs et al.'s question on the toy: do experts share every point, or divide the points?

The squared error of the blend asks every expert to repair what the others leave over. The
likelihood of the mixture lets them compete. Both train the same two linear experts and gate.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

import moejax
import toy
from data import Points
from data import toy as sample

EXPERTS = 2
OBJECTIVES: dict[str, Callable[[int], toy.Task]] = {
    "cooperating": toy.cooperating,
    "competing": toy.competing,
}


def trained_and_tested(
    key: jax.Array, task: toy.Task, samples: int, steps: int
) -> dict[str, jax.Array]:
    """Trains on fresh points and tests on as many others.

    Returns:
        In percent of the test points: the ``accuracy`` of the blend; ``top_alone``, where each
        point's top expert decides alone; ``best_everywhere``, where the better expert decides
        alone on all points. And ``confidence``, the mean of a point's largest gate.
    """
    train_key, test_key, init_key = jax.random.split(key, 3)
    train, test = (sample(one, samples) for one in (train_key, test_key))
    trained = toy.run(task, train, steps, toy.start(task, init_key))
    params = jax.tree.map(lambda leaf: leaf[-1], trained["frames"])
    outputs, logits = toy.outputs_and_logits(params, test.x)
    by_itself = ((outputs > 0) == (test.y > 0.5)).mean(axis=1)  # [E]
    return {
        "accuracy": 100 * blend_accuracy(task, params, test),
        "top_alone": 100 * toy.alone(params, test),
        "best_everywhere": 100 * by_itself.max(),
        "confidence": moejax.confidence(moejax.softmax(logits)),
    }


def blend_accuracy(task: toy.Task, params: object, test: Points) -> jax.Array:
    """The share of points for which the probability of label 1 is on the right side of 1/2."""
    return jnp.mean((task.probability(params, test.x) > 0.5) == (test.y > 0.5))
