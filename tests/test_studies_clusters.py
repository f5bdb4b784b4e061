"""Chen et al.'s clusters: data, networks, training, and the command."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal
from moejax.plot.style import pixels
from studies.clusters_data import CLUSTERS, SCALE, SETTINGS, WIDTH, directions, examples
from studies.clusters_models import (
    CUBIC,
    LINEAR,
    SMALL,
    convolution,
    mixture,
    noisy_switch,
)
from studies.clusters_report import PUBLISHED, verdict
from studies.clusters_training import (
    Sizes,
    dispatch_entropy,
    double_softmax_loss,
    normalized_by_expert,
    train_mixture,
)
from study_cases import studied

pytestmark = pytest.mark.usefixtures("standard_promotion")
COUNT = 4000


def within(sample, expected, *, deviations=5):
    """A sample's mean is as near to its expectation as its own spread allows."""
    assert abs(sample.mean() - expected) < deviations * sample.std() / math.sqrt(len(sample))


@pytest.fixture(scope="module", params=SETTINGS)
def sampled(request):
    setting = SETTINGS[request.param]
    basis = directions(jax.random.key(1))
    made = jax.jit(examples, static_argnums=3)(jax.random.key(2), basis, setting, COUNT)
    return setting, jax.tree.map(np.asarray, basis), jax.tree.map(np.asarray, made)


def test_directions_are_orthonormal(key):
    basis = jnp.concatenate(directions(key))
    np.testing.assert_allclose(basis @ basis.T, np.eye(2 * CLUSTERS), atol=1e-5)


def test_labels_and_clusters_are_uniform(sampled):
    _, _, made = sampled
    within(made.label, 1 / 2)
    for cluster in range(CLUSTERS):
        within(made.cluster == cluster, 1 / CLUSTERS)
        within(made.label[made.cluster == cluster], 1 / 2)


def test_lengths_are_those_of_the_formula(sampled):
    setting, basis, made = sampled
    total = made.x.sum(axis=1) / SCALE  # [N, D]
    rows, y = np.arange(COUNT), 2 * made.label - 1
    features, centres = total @ basis.features.T, total @ basis.centres.T
    within(features[rows, made.cluster] * y, 1.25)
    within(centres[rows, made.cluster], 1.5)
    # What is left is noise, of variance sigma^2 / D in each of the other directions.
    off = total - features @ basis.features - centres @ basis.centres
    share = (WIDTH - 2 * CLUSTERS) / WIDTH
    within((off**2).sum(axis=1), setting.noise**2 * share)
    low, high = setting.distractor
    features[rows, made.cluster] = 0
    second = (low**2 + low * high + high**2) / 3
    within((features**2).sum(axis=1), second + (CLUSTERS - 1) * setting.noise**2 / WIDTH)
    within(features.sum(axis=1) * y, 0)


def test_patches_stand_in_any_order(sampled):
    _, basis, made = sampled
    along = np.einsum("npd,nd->np", made.x, basis.centres[made.cluster])
    for place in range(4):
        within(along.argmax(axis=1) == place, 1 / 4)


@pytest.mark.parametrize(("kind", "power"), [(CUBIC, 3), (LINEAR, 1)])
def test_a_convolution_is_its_formula(key, kind, power):
    layer = convolution(kind, 2)
    params = layer.init(key)
    x = np.asarray(jax.random.normal(key, (5, 4, WIDTH)))
    expected = np.zeros((5, 2))
    for n, example in enumerate(x):
        for patch in example:
            hidden = patch @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
            expected[n] += (hidden**power).reshape(2, 2).sum(axis=1)
    np.testing.assert_allclose(layer.apply(params, kind.tokens(x)), expected, rtol=2e-5, atol=1e-5)


def test_the_noise_chooses_and_weights(key):
    routing = noisy_switch(jnp.zeros((2000, 8)), key=key)
    within(np.asarray(routing.weights[:, 0]), 8 / 9)  # the largest of eight
    within(np.asarray(routing.experts[:, 0] == 3), 1 / 8)
    plain = noisy_switch(jnp.array([[0.1, 0.7, 0.2]]))
    assert plain.experts.item() == 1
    assert plain.weights.item() == pytest.approx(0.7)


def test_a_mixture_is_one_expert_times_its_logit(key):
    model = mixture(CUBIC)
    params = jax.device_get(jax.jit(model.init)(key))
    assert np.abs(params["experts"]["kernel"]).max() <= SMALL / math.sqrt(WIDTH)
    params["router"] = np.asarray(normal(0, *params["router"].shape))
    x = np.asarray(normal(1, 6, 4, WIDTH))
    y, routing = jax.jit(model.apply)(params, CUBIC.tokens(x))
    logits = x.sum(axis=1) @ params["router"]
    best = logits.argmax(axis=-1)
    np.testing.assert_array_equal(routing.experts[:, 0], best)
    expert = jax.jit(convolution(CUBIC, 8).apply)
    for row, e in enumerate(best.tolist()):
        one = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
        alone = expert(one, CUBIC.tokens(x[row : row + 1]))[0]
        np.testing.assert_allclose(y[row], logits[row, e] * alone, rtol=1e-4)


def test_every_expert_takes_a_step_of_one_length():
    gradients = {"kernel": np.arange(12.0).reshape(3, 2, 2) - 3, "bias": np.ones((3, 2))}
    for leaf in gradients.values():
        leaf[1] = 0
    update = jax.jit(normalized_by_expert().update)
    updates = jax.device_get(update(gradients, None)[0])
    norms = sum(np.linalg.norm(leaf.reshape(3, -1), axis=1) for leaf in updates.values())
    np.testing.assert_allclose(norms, [1, 0, 1], rtol=1e-6)
    ratio = updates["kernel"][2] / gradients["kernel"][2]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_dispatch_entropy_is_that_of_the_cluster_given_the_expert():
    chosen, cluster = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 2, 2, 3])
    logits = 9 * np.eye(4, dtype=np.float32)[chosen]
    expected = 3 / 6 * (-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    # Weights below zero, which raw logits can be, do not count other than as choices.
    routing = noisy_switch(logits)._replace(weights=np.full((6, 1), -0.5, np.float32))
    entropy = jax.jit(dispatch_entropy)
    assert float(entropy(routing, cluster)) == pytest.approx(expected, abs=1e-5)
    same = moejax.switch(np.zeros((8, 4), np.float32))
    blind = float(entropy(same, np.arange(8) % 4))
    assert blind == pytest.approx(math.log(4), abs=1e-5)


def test_the_published_loss_has_a_floor():
    right, labels = np.array([[-50.0, 50.0]]), np.array([1])
    floor = float(jax.jit(double_softmax_loss)(right, labels))
    assert floor == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_training_learns_and_its_curve_follows(key):
    sizes = Sizes(examples=1000, mixture_steps=120, single_steps=1)
    one = jax.device_get(jax.jit(lambda key: train_mixture(key, SETTINGS[3], CUBIC, sizes))(key))
    assert one["accuracy"] > 80
    assert one["curve"].shape == (12,)
    assert one["curve"][0] > 1.3 > one["curve"][-1] >= 0
    assert one["steps"] <= 120


def test_every_cell_has_its_lines():
    summary, measured, study = studied("clusters", "--seeds 3 --single-seeds 1 --settings 1 3")
    assert len(summary["cells"]) == 8
    one = summary["cells"]["3-linear"]["accuracy"]
    assert one["low"] <= one["mean"] <= one["high"]
    text = study.render(summary)
    assert "| 3 | eight cubic experts | 3 | 99.99 ± 0.02 |" in text
    assert "| 1 | one linear network | 1 | 68.31 |" in text
    assert "All this took 90 seconds, compilation included, on 2 cores of a processor." in text
    assert len(study.draw(summary, measured).axes) == 4


def test_a_small_run_is_drawn_whole():
    options = "--seeds 2 --single-seeds 0 --settings 1 --steps 1"
    _, measured, study = studied("clusters", options)
    measured["1-linear"]["accuracy"] = np.array([30.0, 40.0])  # whose interval goes below zero
    measured["1-nonlinear"]["accuracy"] = np.array([95.0, 99.0])  # and beyond 100
    figure = study.draw(study.summarize(measured), measured)
    pixels(figure)
    top, bottom = figure.axes
    names = [tick.get_text().replace("\n", " ") for tick in top.get_xticklabels()]
    assert names == ["eight cubic experts", "eight linear experts"]  # no network alone
    low, high = top.get_ylim()
    drawn = [bars.get_segments() for bars in top.collections if hasattr(bars, "get_segments")]
    heights = np.concatenate(drawn, axis=None).reshape(-1, 2)[:, 1]
    assert low < heights.min() < heights.max() < high
    (legend,) = figure.legends
    assert not top.get_window_extent().overlaps(legend.get_window_extent())
    points = [line for line in bottom.lines if len(line.get_xdata()) == 1]
    assert [line.get_marker() for line in points] == [".", "."]


def test_the_verdict_names_what_was_missed():
    values = {"values": [0.25, 0.5, 0.75]}
    cell = {"accuracy": {"mean": 99.0}, "entropy": {"mean": 0.5} | values}
    theirs = {
        measure: {"mean": mean, "sd": sd}
        for measure, (mean, sd) in PUBLISHED["1-nonlinear"].items()
    }
    text = verdict({"cells": {"1-nonlinear": cell}, "published": {"1-nonlinear": theirs}})
    assert text.startswith("1 of 2 means")
    assert text.endswith(
        "Not within it: entropy of eight cubic experts in setting 1 (seeds from 0.250 to 0.750, "
        "median 0.500)."
    )
