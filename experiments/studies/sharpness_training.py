"""Trains a head with its trunk, and measures the Hessian where training ends.

The Hessian is that of the mean cross-entropy in all parameters, including the trunk's; the balance
loss of training is not part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import moejax
from data import Split
from moejax.training import epoch_order, init_state, scan_batches, train_step
from studies.hessian import along, hessian_vector, hutchinson, lanczos, rademacher, ritz

DISTANCES = np.linspace(-0.5, 0.5, 21)  # along the top eigenvector
DROPS = (0.6, 0.8)  # of training, where the rate becomes a tenth


class Images(NamedTuple):
    """What a run sees.

    Attributes:
        train: images to learn from.
        test: images to test on.
        measured: images at which the Hessian is taken, as many of both kinds, [2, N, ...]:
            training images first, then test images.
    """

    train: Split
    test: Split
    measured: Split


class Sizes(NamedTuple):
    """How long a run takes.

    Attributes:
        epochs: of training.
        batch_size: of training.
        rate: of training, before it drops.
        starts: random vectors from which Lanczos starts.
        steps: of Lanczos from each.
        probes: of the trace.
    """

    epochs: int
    batch_size: int
    rate: float
    starts: int
    steps: int
    probes: int


def run(key: jax.Array, images: Images, *, model: moejax.Layer, sizes: Sizes) -> dict[str, Any]:
    """Trains and measures.

    Returns:
        ``accuracy`` and ``train_accuracy`` in percent, on all images; and for ``train`` and
        ``test`` what `curvature` returns, as ``train_largest`` and so on.
    """
    train_key, key = jax.random.split(key)
    params = train(train_key, images.train, model=model, sizes=sizes)
    both = jax.lax.map(
        lambda split: curvature(key, params, split, model=model, sizes=sizes), images.measured
    )
    return {
        "accuracy": accuracy(model, params, images.test),
        "train_accuracy": accuracy(model, params, images.train),
        **{
            f"{name}_{measure}": values[place]
            for measure, values in both.items()
            for place, name in enumerate(("train", "test"))
        },
    }


def train(key: jax.Array, data: Split, *, model: moejax.Layer, sizes: Sizes) -> Any:
    """The parameters after training on whole batches by Adam, whose rate drops twice."""
    init_key, run_key = jax.random.split(key)
    per_epoch = len(data.labels) // sizes.batch_size
    steps = sizes.epochs * per_epoch
    rate = optax.piecewise_constant_schedule(
        sizes.rate, {round(drop * steps): 0.1 for drop in DROPS}
    )
    optimizer = optax.adam(rate)

    def objective(
        params: Any, batch: Split, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, balance = model.apply(params, batch.images)
        return cross_entropy(logits, batch.labels) + balance, {}

    state = init_state(model.init(init_key), optimizer, run_key)
    order = jax.vmap(lambda epoch: epoch_order(state, epoch, len(data.labels)))(
        jnp.arange(sizes.epochs)
    )
    batches = order[:, : per_epoch * sizes.batch_size].reshape(steps, sizes.batch_size)
    state, _ = scan_batches(train_step(objective, optimizer), state, data, batches)
    return state.params


def curvature(
    key: jax.Array, params: Any, data: Split, *, model: moejax.Layer, sizes: Sizes
) -> dict[str, jax.Array]:
    """What the Hessian is like at these parameters, on these images.

    Returns:
        ``largest`` eigenvalue; its ``residual``, the most that it is away from an eigenvalue;
        ``trace``, its standard ``error``; ``loss``; approximate eigenvalues ``values`` and
        their ``weights`` [starts, steps]; and ``line``, the loss at `DISTANCES` along the top
        eigenvector, up the steeper side.
    """
    flat, unravel = ravel_pytree(params)

    def loss(flat: jax.Array) -> jax.Array:
        return cross_entropy(model.apply(unravel(flat), data.images)[0], data.labels)

    def product(vector: jax.Array) -> jax.Array:
        return hessian_vector(loss, flat, vector)

    starts_key, probes_key = jax.random.split(key)
    spectra = jax.lax.map(
        lambda key: ritz(lanczos(product, rademacher(key, flat), sizes.steps)),
        jax.random.split(starts_key, sizes.starts),
    )
    best = jnp.argmax(spectra.values[:, -1])  # each is at most the largest eigenvalue
    trace = hutchinson(product, flat, jax.random.split(probes_key, sizes.probes))
    line = along(loss, flat, spectra.vector[best], jnp.asarray(DISTANCES, flat.dtype))
    return {
        "largest": spectra.values[best, -1],
        "residual": spectra.residual[best],
        "trace": trace.mean,
        "error": trace.error,
        "loss": line[len(DISTANCES) // 2],
        "values": spectra.values,
        "weights": spectra.weights,
        "line": jnp.where(line[0] > line[-1], line[::-1], line),
    }


def cross_entropy(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """The mean cross-entropy over the images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(model: moejax.Layer, params: Any, data: Split) -> jax.Array:
    """Accuracy in percent of the images."""
    logits, _ = model.apply(params, data.images)
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == data.labels)
