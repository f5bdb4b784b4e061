"""Competition and trees of experts: the model, EM, and the command."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from studies import em
from studies.competition import trained_and_tested
from studies.hierarchy_measures import PROBLEMS, by_gradient, measure
from studies.hierarchy_report import monotone
from studies.regimes import EDGES, NOISES, regimes, truth
from studies.tree import BERNOULLI, GAUSSIAN, Tree, init, log_gates, mean, nll
from study_cases import studied

pytestmark = pytest.mark.usefixtures("standard_promotion")


def sample(problem, key, count=120):
    data_key, init_key = jax.random.split(key)
    return problem.sample(data_key, count), init(problem.tree, init_key)


@pytest.mark.parametrize("name", PROBLEMS)
def test_em_never_lowers_the_likelihood(name, x64):
    problem = PROBLEMS[name]

    def fit(key):
        data, params = sample(problem, key)
        return em.fit(problem.tree, problem.family, params, *data, 100)[1]

    curves = np.asarray(jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(0), 4)))
    assert curves.dtype == np.float64
    assert curves.shape == (4, 101)
    assert np.isfinite(curves).all()
    # A sum of 120 terms is known to some units in its last place.
    assert np.diff(curves, axis=1).max() <= 1e-13 * np.abs(curves).max()
    assert (curves[:, 0] - curves[:, -1] > 0.3).all()


def test_newton_is_weighted_least_squares(x64):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 2)), random.normal(size=(50, 1))
    posterior = random.dirichlet(np.ones(3), size=50)
    tree = Tree(2, 1, 3)
    fit = jax.jit(lambda key, *data: em.fitted_leaves(tree, GAUSSIAN, init(tree, key), *data))
    found = jax.device_get(fit(jax.random.key(0), x, y, posterior))
    design = np.column_stack([x, np.ones(50)])
    for leaf in range(3):
        weight = posterior[:, leaf]
        root = np.sqrt(weight)[:, None]
        solution, *_ = np.linalg.lstsq(root * design, root * y, rcond=None)
        kernel, bias = (found["experts"][each][leaf] for each in ("kernel", "bias"))
        np.testing.assert_allclose(kernel, solution[:2], atol=1e-7)
        np.testing.assert_allclose(bias, solution[2], atol=1e-7)
        residual = y - design @ solution
        variance = (weight * residual[:, 0] ** 2).sum() / weight.sum()
        assert found["log_variance"][leaf] == pytest.approx(math.log(variance), abs=1e-7)


@pytest.mark.parametrize("start", [-3.0, 0.0, 40.0])
def test_newton_takes_no_step_that_lowers(start, x64):
    # Where log cosh is flat, Newton's step overshoots by far.
    objective = lambda x: -jnp.logaddexp(x["at"], -x["at"]).sum()  # noqa: E731
    before = {"at": jnp.array([start])}
    after = em.newton(objective, before)
    assert objective(after) >= objective(before)
    assert bool(jnp.isfinite(after["at"]).all())


@pytest.mark.parametrize("family", [GAUSSIAN, BERNOULLI])
def test_a_tree_is_its_double_sum(family, x64, key):
    tree = Tree(2, 3, 2)
    params = jax.device_get(jax.jit(lambda key: init(tree, key))(key))
    params["log_variance"] = np.linspace(-1, 1, 6)
    x = np.random.default_rng(0).normal(size=(4, 2))
    y = np.array([0.0, 1, 1, 0])
    total, blend = np.zeros(4), np.zeros(4)
    dense = lambda layer, row: row @ layer["kernel"] + layer["bias"]  # noqa: E731
    softmax = lambda logits: np.exp(logits) / np.exp(logits).sum()  # noqa: E731
    for n, row in enumerate(x):
        groups = softmax(dense(params["top"], row))
        for group in range(3):
            leaves = softmax(dense(jax.tree.map(lambda a, g=group: a[g], params["low"]), row))
            for leaf in range(2):
                index = 2 * group + leaf
                layer = jax.tree.map(lambda a, i=index: a[i], params["experts"])
                output = dense(layer, row)[0]
                variance = math.exp(params["log_variance"][index])
                if family is GAUSSIAN:
                    p = math.exp(-((y[n] - output) ** 2) / 2 / variance)
                    p, mu = p / math.sqrt(2 * math.pi * variance), output
                else:
                    mu = 1 / (1 + math.exp(-output))
                    p = mu if y[n] else 1 - mu
                total[n] += groups[group] * leaves[leaf] * p
                blend[n] += groups[group] * leaves[leaf] * mu
    targets = y[:, None] if family is GAUSSIAN else y

    @jax.jit
    def find(params, x, targets):
        predicted = mean(tree, family, params, x)
        return nll(tree, family, params, x, targets), predicted, log_gates(tree, params, x)

    likelihood, predicted, gates = find(params, x, targets)
    assert float(likelihood) == pytest.approx(-np.log(total).mean(), rel=1e-12)
    np.testing.assert_allclose(predicted, blend, rtol=1e-12)
    np.testing.assert_allclose(np.exp(gates).sum(axis=1), 1, rtol=1e-12)


def test_regimes_have_their_lines_and_noises(key):
    found = jax.jit(regimes, static_argnums=1)(key, 8000)
    x, y = (np.asarray(each)[:, 0] for each in found)
    rest, regime = y - truth(x), np.searchsorted(EDGES, x)
    for index, noise in enumerate(NOISES):
        here = rest[regime == index]
        assert abs(len(here) / 8000 - 1 / 4) < 0.03
        assert abs(here.mean()) < 5 * noise / math.sqrt(len(here))
        assert here.std() == pytest.approx(noise, rel=0.1)


def test_a_gradient_begins_where_em_does_and_descends(x64, key):
    problem = PROBLEMS["regimes"]

    @jax.jit
    def descend(key):
        data, params = sample(problem, key)
        _, curve = by_gradient(0.03, 40)(problem, params, data)
        return curve, nll(problem.tree, problem.family, params, *data)

    curve, begin = descend(key)
    assert float(curve[0]) == float(begin)
    assert curve.shape == (41,)
    assert float(curve[-1]) < float(curve[0]) - 0.1


def test_what_is_measured_of_a_fit(x64, key):
    problem = PROBLEMS["regimes"]

    def halfway(problem, params, data):
        return params, jnp.array([3.0, 2.0, 1.005, 1.0])

    @jax.jit
    def look(key):
        params = init(problem.tree, jax.random.split(key, 3)[2])
        predicted = mean(problem.tree, GAUSSIAN, params, jnp.zeros((1, 1)))
        return measure(key, problem, halfway, 50), predicted

    one, predicted = look(key)
    assert int(one["converged"]) == 2
    assert int(one["iterations"]) == 3
    assert float(one["largest_rise"]) == pytest.approx(-0.005)
    assert one["gates"].shape == (101, 4)
    assert float(one["mean"][50]) == pytest.approx(float(predicted[0]))


def test_competing_experts_know_more_alone():
    def both(key):
        return [
            trained_and_tested(key, task(2), samples=300, steps=300)
            for task in (toy.cooperating, toy.competing)
        ]

    keys = jax.random.split(jax.random.key(0), 5)
    cooperating, competing = jax.device_get(jax.jit(jax.vmap(both))(keys))
    lost = [(one["accuracy"] - one["top_alone"]).mean() for one in (cooperating, competing)]
    assert lost[0] > 3 > 1.5 > abs(lost[1])
    assert competing["confidence"].mean() > cooperating["confidence"].mean()


def test_a_rise_would_be_reported():
    cell = {"largest_rise": {"values": [-1.0, 0.25]}, "nll": {"values": [1.0, 2.0]}}
    assert "rises by up to 2.5e-01" in monotone({"cells": {"circle-em": cell}})
    cell["largest_rise"]["values"][1] = -0.5
    assert "over 2 fits" in monotone({"cells": {"circle-em": cell}})


def test_every_cell_has_its_line_and_its_curve(x64):
    options = "--toy-seeds 4 --seeds 3 --iterations 5 --steps 7"
    summary, measured, study = studied("hierarchy", options)
    assert len(summary["cells"]) == 2 + 2 * 5
    text = study.render(summary)
    assert "| toy" not in text
    for name in ("one expert", "EM", "Adam 0.003", "Adam 0.03", "Adam 0.1"):
        for problem in PROBLEMS:
            assert f"| {problem} | {name} | 3 |" in text
    curves = study.draw(summary, measured).axes[2:]
    assert [len(ax.lines) for ax in curves] == [5, 5]
