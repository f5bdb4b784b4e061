"""The measures of a tree of experts, fitted by EM or by a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import toy
from moejax.training import init_state, train_step
from studies import em
from studies.regimes import Pairs, regimes
from studies.tree import BERNOULLI, GAUSSIAN, Family, Tree, init, log_gates, mean, nll

GRID = np.linspace(-2, 2, 101)  # where the picture shows a tree of one input
POINTS = 100  # intervals of the curve of the likelihood
NEAR = 0.01  # nats from its end at which a fit counts as converged


class Problem(NamedTuple):
    """Data, and the tree for them.

    Attributes:
        sample: ``(key, N) -> pairs``.
        tree: sizes.
        family: of the leaves.
        error: ``(mean [N], y) -> what it is called, and its value``.
    """

    sample: Callable[[jax.Array, int], Pairs]
    tree: Tree
    family: Family
    error: Callable[[jax.Array, jax.Array], tuple[str, jax.Array]]


def circle(key: jax.Array, count: int) -> Pairs:
    """The toy's points in the widest float that is on."""
    return Pairs(*(values.astype(jnp.zeros(()).dtype) for values in toy(key, count)))


def relative_error(mean: jax.Array, y: jax.Array) -> tuple[str, jax.Array]:
    """Mean squared error, relative to the variance of the target."""
    return "relative_error", jnp.mean((mean - y[:, 0]) ** 2) / jnp.var(y)


def percent_right(mean: jax.Array, y: jax.Array) -> tuple[str, jax.Array]:
    """Accuracy in percent."""
    return "accuracy", 100 * jnp.mean((mean > 0.5) == (y > 0.5))


PROBLEMS = {
    "regimes": Problem(regimes, Tree(1, 2, 2), GAUSSIAN, relative_error),
    "circle": Problem(circle, Tree(2, 2, 2), BERNOULLI, percent_right),
}
Fit = Callable[[Problem, Any, Pairs], tuple[Any, jax.Array]]  # -> params, nll by iteration


def by_em(iterations: int) -> Fit:
    """A fit by EM."""
    return lambda problem, params, data: em.fit(
        problem.tree, problem.family, params, *data, iterations
    )


def by_gradient(rate: jax.Array | float, iterations: int) -> Fit:
    """A fit by Adam on all examples at once."""

    def fit(problem: Problem, params: Any, data: Pairs) -> tuple[Any, jax.Array]:
        optimizer = optax.adam(rate)

        def objective(
            params: Any, batch: Pairs, key: jax.Array | None
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return nll(problem.tree, problem.family, params, *batch), {}

        step = train_step(objective, optimizer)

        def body(state: Any, _: None) -> tuple[Any, jax.Array]:
            after, metrics = step(state, data)
            return after, metrics["loss"]

        state = init_state(params, optimizer, jax.random.key(0))  # it draws nothing
        state, before = jax.lax.scan(body, state, length=iterations)
        last = nll(problem.tree, problem.family, state.params, *data)
        return state.params, jnp.append(before, last)

    return fit


def measure(key: jax.Array, problem: Problem, fit: Fit, samples: int) -> dict[str, jax.Array]:
    """Fits on fresh examples and tests on as many others.

    Returns:
        ``nll`` at the end and ``test_nll``, in nats per example; the problem's error on the test
        examples; ``converged``, after how many iterations the likelihood is within `NEAR` of its
        end; ``largest_rise`` of the nll in one iteration; its ``curve`` at `POINTS` + 1
        iterations; the number of ``iterations``; and, with one input, ``gates`` and ``mean`` on
        the `GRID`.
    """
    train_key, test_key, init_key = jax.random.split(key, 3)
    train, test = (problem.sample(one, samples) for one in (train_key, test_key))
    params, curve = fit(problem, init(problem.tree, init_key), train)
    name, error = problem.error(mean(problem.tree, problem.family, params, test.x), test.y)
    shown = np.rint(np.linspace(0, len(curve) - 1, POINTS + 1)).astype(int)
    values = {
        "nll": curve[-1],
        "test_nll": nll(problem.tree, problem.family, params, *test),
        name: error,
        "converged": jnp.argmax(curve <= curve[-1] + NEAR),
        "largest_rise": jnp.diff(curve).max(),
        "iterations": jnp.asarray(len(curve) - 1),
        "curve": curve[shown],
    }
    if problem.tree.width > 1:
        return values
    grid = jnp.asarray(GRID, test.x.dtype)[:, None]
    return values | {
        "gates": jnp.exp(log_gates(problem.tree, params, grid)),
        "mean": mean(problem.tree, problem.family, params, grid),
    }
