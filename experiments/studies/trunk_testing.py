"""Tests a head with its trunk, on images as they are and on images moved by a pixel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import numpy as np

import moejax
from studies.trunk_training import Run, Training, classify

AT_ONCE = 250  # images: on CPU larger batches take longer
SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))  # pixels down, pixels to the right

Look = Callable[[Run, np.ndarray], dict[str, jax.Array]]


def evaluate(training: Training, run: Run, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
    """One batch of test images.

    Returns:
        ``log_probabilities`` [N, 10], and of a sparse head the ``load`` of every expert, its share
        of the choices, [E].
    """
    logits, decision, _ = classify(
        training.head, run.params, run.statistics, images, training=False
    )
    load = {} if training.head.active == 1 else {"load": moejax.expert_load(decision)}
    return {"log_probabilities": jax.nn.log_softmax(logits)} | load


def evaluate_all(look: Look, run: Run, images: np.ndarray) -> dict[str, np.ndarray]:
    """All test images, batch by batch, by a compiled `evaluate`."""
    batches = [images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE)]
    found = [jax.device_get(look(run, batch)) for batch in batches]
    result = {"log_probabilities": np.concatenate([one["log_probabilities"] for one in found])}
    if "load" in found[0]:
        sizes = [len(batch) for batch in batches]
        result["load"] = np.average([one["load"] for one in found], axis=0, weights=sizes)
    return result


def accuracy(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """In percent."""
    return 100 * float(np.mean(np.argmax(log_probabilities, axis=-1) == labels))


def blended(look: Look, run: Run, images: np.ndarray) -> np.ndarray:
    """The mean log-probabilities of an image and of its eight shifts by a pixel, [N, 10]."""
    views = [
        evaluate_all(look, run, shifted(images, *shift))["log_probabilities"] for shift in SHIFTS
    ]
    return np.mean(views, axis=0)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images moved by at most a pixel, black at the side that they leave, [N, H, W]."""
    _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
