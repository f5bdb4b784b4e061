"""Chen et al.'s training: whole-batch steps, of equal length for every expert that has a gradient.

A whole run, its data included, is one pure function of its key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import moejax
from studies.clusters_data import CLUSTERS, Examples, Setting, directions, examples
from studies.clusters_models import SINGLE_FILTERS, Kind, convolution, mixture

EXPERT_RATE, ROUTER_RATE = 1e-3, 0.1
# A mixture ends once its loss rises while it is this low, or rises by so much above its least.
LOW_ENOUGH, RISE = 0.314, 0.02
NEVER_BEFORE = 500  # steps of a single network
EVERY = 10  # steps between two points of the curve of the entropy


class Sizes(NamedTuple):
    """How large the study is: examples to train and as many to test, steps of both kinds."""

    examples: int
    mixture_steps: int
    single_steps: int


class Run(NamedTuple):
    """A run under way; only mixtures use ``entropy`` and ``curve``."""

    params: Any
    state: Any
    step: jax.Array
    least: jax.Array
    entropy: jax.Array
    curve: jax.Array
    ended: jax.Array


def normalized_by_expert() -> optax.GradientTransformation:
    """Divides every expert's gradient by the sum of the norms of its leaves; zero stays zero."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norms = jax.tree.map(
            lambda leaf: jnp.linalg.norm(leaf.reshape(len(leaf), -1), axis=1), updates
        )
        norm = jax.tree.reduce(jnp.add, norms)  # [E]
        factor = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(
            lambda leaf: leaf * factor.reshape(-1, *(1,) * (leaf.ndim - 1)), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def dispatch_entropy(routing: moejax.Routing, cluster: jax.Array) -> jax.Array:
    """``H(cluster | expert)`` in nats: 0 where each expert sees one cluster, log 4 where all."""
    dispatched = routing._replace(weights=jnp.ones_like(routing.weights))
    table = moejax.expert_by_class(dispatched, cluster, CLUSTERS)  # [E, clusters]
    share = table.sum(axis=0) / table.sum()
    return jax.scipy.special.entr(share).sum() - moejax.mutual_information(table)


def double_softmax_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of ``softmax(softmax(scores))``, which is never below log(1 + 1/e).

    The published code gives probabilities to a loss that takes a softmax of its own.
    """
    return cross_entropy(jax.nn.softmax(scores), labels)


def cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def accuracy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The accuracy in percent."""
    return 100 * jnp.mean(scores.argmax(axis=-1) == labels)


def data_of(key: jax.Array, setting: Setting, kind: Kind, count: int) -> tuple[Examples, Examples]:
    """Examples to train and to test, from the same directions, as tokens of a kind of network."""
    basis_key, examples_key = jax.random.split(key)
    both = examples(examples_key, directions(basis_key), setting, 2 * count)
    both = both._replace(x=kind.tokens(both.x))
    train, test = (
        jax.tree.map(lambda leaf, half=half: leaf[half], both)
        for half in (slice(count), slice(count, None))
    )
    return train, test


def fresh(params: Any, optimizer: optax.GradientTransformation, points: tuple[int, ...]) -> Run:
    """A run before its first step, with a curve of so many points."""
    return Run(
        params,
        optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        least=jnp.full((), jnp.inf),
        entropy=jnp.zeros(()),
        curve=jnp.zeros(points),
        ended=jnp.zeros((), bool),
    )


def stepped(
    run: Run,
    optimizer: optax.GradientTransformation,
    loss: jax.Array,
    gradients: Any,
    ended: jax.Array,
) -> Run:
    """The run after a step, which is not taken if the run has ended."""
    updates, state = optimizer.update(gradients, run.state, run.params)
    moved = optax.apply_updates(run.params, updates)
    params = jax.tree.map(lambda old, new: jnp.where(ended, old, new), run.params, moved)
    least = jnp.minimum(loss, run.least)
    return run._replace(params=params, state=state, step=run.step + 1, least=least, ended=ended)


def optimizer_of_mixture() -> optax.GradientTransformation:
    """Steps of one length for experts, plain ones for the router."""
    return optax.partition(
        {
            "experts": optax.chain(normalized_by_expert(), optax.sgd(EXPERT_RATE)),
            "router": optax.sgd(ROUTER_RATE),
        },
        {"experts": "experts", "router": "router"},
    )


def run_mixture(
    model: moejax.Layer, params: Any, train: Examples, key: jax.Array, steps: int
) -> Run:
    """Trains a mixture until its loss is low and rises, or for all steps."""
    optimizer = optimizer_of_mixture()

    def loss(params: Any, key: jax.Array) -> tuple[jax.Array, moejax.Routing]:
        scores, routing = model.apply(params, train.x, key=key)
        return double_softmax_loss(scores, train.label), routing

    def body(run: Run) -> Run:
        (value, routing), gradients = jax.value_and_grad(loss, has_aux=True)(
            run.params, jax.random.fold_in(key, run.step)
        )
        ended = (value > run.least) & ((value > run.least + RISE) | (value <= LOW_ENOUGH))
        entropy = jax.lax.cond(
            ended | (run.step == steps - 1) | (run.step % EVERY == 0),
            lambda: dispatch_entropy(routing, train.cluster),
            lambda: run.entropy,
        )
        curve = run.curve.at[run.step // EVERY].set(entropy)
        after = stepped(run, optimizer, value, gradients, ended)
        return after._replace(entropy=entropy, curve=curve)

    begun = fresh(params, optimizer, ((steps - 1) // EVERY + 1,))
    run = jax.lax.while_loop(lambda run: (run.step < steps) & ~run.ended, body, begun)
    # A run that has ended stays where it is.
    reached = jnp.arange(len(run.curve)) <= (run.step - 1) // EVERY
    return run._replace(curve=jnp.where(reached, run.curve, run.entropy))


def train_mixture(
    key: jax.Array, setting: Setting, kind: Kind, sizes: Sizes
) -> dict[str, jax.Array]:
    """Trains a mixture and tests it.

    Returns:
        ``accuracy`` on the test examples with the router's noise, as published, and
        ``accuracy_without_noise``; the ``entropy`` of the dispatch at the last step, and its
        ``curve``, a point for every `EVERY` steps; the number of ``steps``.
    """
    data_key, init_key, noise_key, test_key = jax.random.split(key, 4)
    train, test = data_of(data_key, setting, kind, sizes.examples)
    model = mixture(kind)
    run = run_mixture(model, model.init(init_key), train, noise_key, sizes.mixture_steps)
    with_noise, _ = model.apply(run.params, test.x, key=test_key)
    without, _ = model.apply(run.params, test.x)
    return {
        "accuracy": accuracy(with_noise, test.label),
        "accuracy_without_noise": accuracy(without, test.label),
        "entropy": run.entropy,
        "curve": run.curve,
        "steps": run.step,
    }


def train_single(
    key: jax.Array, setting: Setting, rate: float, kind: Kind, sizes: Sizes
) -> dict[str, jax.Array]:
    """Trains one network by Adam with weight decay, and tests it.

    Returns:
        Its ``accuracy`` on the test examples, and the number of ``steps``.
    """
    data_key, init_key, _, _ = jax.random.split(key, 4)
    train, test = data_of(data_key, setting, kind, sizes.examples)
    model = convolution(kind, SINGLE_FILTERS)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(rate))

    def body(run: Run) -> Run:
        value, gradients = jax.value_and_grad(
            lambda params: cross_entropy(model.apply(params, train.x), train.label)
        )(run.params)
        ended = (run.step > NEVER_BEFORE) & (value > run.least + RISE)
        return stepped(run, optimizer, value, gradients, ended)

    begun = fresh(model.init(init_key), optimizer, ())
    run = jax.lax.while_loop(lambda run: (run.step < sizes.single_steps) & ~run.ended, body, begun)
    return {"accuracy": accuracy(model.apply(run.params, test.x), test.label), "steps": run.step}
