"""The study of heads on a convolutional trunk: distortion, what a run measures, the command."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from commands import refusal, run
from data import Split
from heads import of_all, of_undistorted
from mnist_files import write_small_mnist
from parts.routes import nothing
from studies import distortion, heads_report, trunk_testing
from studies.distortion import bends, distorted
from studies.heads import EXPERTS, heads
from studies.trunk import FEATURES, Trunk
from studies.trunk_testing import accuracy, blended, evaluate, evaluate_all, shifted
from studies.trunk_training import (
    Training,
    adamw,
    classify,
    faithful_images,
    start,
    step,
)
from study_cases import save_no_pictures

pytestmark = pytest.mark.usefixtures("standard_promotion")


def digit(row=slice(8, 20), column=slice(12, 15)):
    """A white bar on black."""
    image = np.zeros((28, 28), np.uint8)
    image[row, column] = 255
    return image


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)


def exactly(monkeypatch, degrees=0, scale=0, pixels=0):
    """Distorts every image as far as it goes, in the same direction."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.ones(shape))
    for name, value in {"DEGREES": degrees, "SCALE": scale, "PIXELS": pixels, "BEND": 0}.items():
        monkeypatch.setattr(distortion, name, value)


def distort(key, *images):
    """Compiled with the constants of the moment."""
    return np.asarray(jax.jit(lambda *given: distorted(*given))(key, np.stack(images)))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, digit()),
        ({"pixels": 2}, digit(slice(6, 18), slice(10, 13))),
        ({"degrees": 90}, np.rot90(digit(), -1)),
        ({"degrees": 180}, np.rot90(digit(), 2)),
    ],
)
def test_distortions_move_pixels(monkeypatch, key, how, expected):
    exactly(monkeypatch, **how)
    found = distort(key, digit())[0]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_scale_moves_towards_the_centre(monkeypatch, key):
    exactly(monkeypatch, scale=1)  # every pixel is read from twice as far
    found = distort(key, digit(slice(4, 24), slice(12, 16)))[0]
    assert found.sum() == pytest.approx(255 * 20 * 4 / 4, rel=0.05)


def test_every_image_has_chances_of_its_own(key):
    found = distort(key, *[digit()] * 3)
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])
    assert 0 <= found.min() < found.max() < 255.1


def test_bends_are_as_large_as_drawn_and_smooth(key):
    found = np.asarray(bends(key, 500, [28, 28]))
    assert found.shape == (500, 2, 28, 28)
    assert abs(found.mean()) < 0.02
    assert 0.35 < found.std() < 0.5  # between nodes less than at them, which have 0.5
    assert np.abs(np.diff(found, axis=-1)).mean() < 0.1 < np.abs(found).mean()
    assert abs(np.corrcoef(found[:, 0, 14, 14], found[:, 1, 14, 14])[0, 1]) < 0.2


def test_bent_images_differ_from_straight_ones(monkeypatch, key):
    bent = distort(key, digit())
    monkeypatch.setattr(distortion, "BEND", 0)
    assert np.abs(bent - distort(key, digit())).max() > 20


def test_features_are_normalised_in_training_alone(key):
    images = noise(6)
    variables = jax.jit(partial(Trunk().init, training=False))(key, images)
    train = jax.jit(partial(Trunk().apply, training=True, mutable=["batch_stats"]))
    features, moved = train(variables, images)
    assert features.shape == (6, FEATURES)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    before, after = variables["batch_stats"], moved["batch_stats"]
    assert not np.allclose(*(each["BatchNorm_0"]["mean"] for each in (before, after)))
    test = jax.jit(partial(Trunk().apply, training=False))
    others = np.concatenate([images[:1], 255 - images[1:]])
    one, same = (test(variables, batch)[0] for batch in (images, others))
    np.testing.assert_allclose(one, same, atol=1e-5)


MACHINE = {"cores": "2", "processor": "a processor"}
OPTIONS = "--epochs 2 --batch-size 10 --seeds 1 --no-cache --heads dense top-1".split()


def test_the_command_ends_with_tables_and_goes_on(tmp_path, capsys, monkeypatch):
    folder = str(write_small_mnist(tmp_path / "data").folder)
    page = tmp_path / "studies.md"
    page.write_text("<!-- heads -->\n<!-- /heads -->\n")
    options = [*OPTIONS, "--data-dir", folder, "--out", str(tmp_path / "out")]
    run("heads", *options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    block = json.loads((tmp_path / "out" / "blocks" / "top-1-000-001.json").read_text())
    assert np.shape(block["load"]) == (1, 2, EXPERTS)
    np.testing.assert_allclose(np.sum(block["load"], axis=-1), 1, rtol=1e-6)
    accuracy = summary["cells"]["top-1"]["accuracy"]["values"]
    assert accuracy == [pytest.approx(block["accuracy"][0][-1], rel=1e-5)]
    assert (tmp_path / "out" / "heads.png").stat().st_size > 10_000
    capsys.readouterr()

    save_no_pictures(monkeypatch)
    run("heads", *options, "--resume", "--docs", str(tmp_path))
    for text in (capsys.readouterr().out, page.read_text()):
        assert "| head | seeds | published | ours, best epoch | ours, last epoch | minus" in text
        assert "| dense | 1 | 99.65 |" in text
    message = refusal("heads", *options, "--resume", "--learning-rate", "0.2", capsys=capsys)
    assert "--learning-rate must be what the run began with, 0.004" in message


def test_too_few_images_are_refused(tmp_path, capsys):
    folder = str(write_small_mnist(tmp_path / "data").folder)
    message = refusal("heads", "--data-dir", folder, "--out", str(tmp_path / "out"), capsys=capsys)
    assert "--batch-size must be at most the number of training images, 30, got 128" in message


def test_the_summary_says_what_was_measured():
    load = np.full((2, 3, EXPERTS), 1 / EXPERTS)
    load[1, -1, :2] = 0.1, 0.15
    right = np.array([[90, 99.7, 99.6], [90, 99.5, 99.4]])
    measured = {
        "dense": {"accuracy": right, "loss": 1 - right / 100, "blended": right[:, 1]},
        "top-1": {
            "accuracy": right + 0.1,
            "loss": 1 - right / 100,
            "blended": right[:, 1],
            "load": load,
        },
    }
    summary = heads_report.summarize(measured)
    assert summary["cells"]["dense"]["accuracy"]["mean"] == pytest.approx(99.5)
    assert summary["cells"]["dense"]["best"]["mean"] == pytest.approx(99.6)
    assert summary["cells"]["top-1"]["smallest"]["values"] == pytest.approx([1, 0.8])
    assert summary["cells"]["top-1"]["largest"]["values"] == pytest.approx([1, 1.2])
    assert summary["differences"]["top-1"]["values"] == pytest.approx([0.1, 0.1])
    assert summary["cells"]["dense"]["blended"]["values"] == pytest.approx([99.7, 99.5])
    text = heads_report.render(summary | {"seconds": 90.0, "versions": MACHINE})
    assert (
        "| dense | 2 | 99.65 | 99.60 [98.33, 100.87] | 99.50 ± 0.14 [98.23, 100.77] |  | 99.60 ±"
        in text
    )
    assert "Better than dense, by an interval that leaves out zero: top-1; worse: no head." in text
    assert "The load farthest from even, of any head and seed, is 20.0% off." in text
    alone = heads_report.summarize({"dense": measured["dense"]})
    text = heads_report.render(alone | {"seconds": 90.0, "versions": MACHINE})
    assert "Loads" not in text
    assert "Better" not in text


def test_one_seed_shows_no_difference():
    one = {"accuracy": np.array([[99.0]]), "loss": np.ones((1, 1)), "blended": np.array([99.0])}
    summary = heads_report.summarize({"dense": one, "soft": one})
    assert heads_report.verdict(summary) == "One seed shows no difference.\n"


def test_all_heads_are_of_equal_size(key):
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(head.layer.init, key)))
        for name, head in heads(FEATURES).items()
    }
    router = FEATURES * EXPERTS + EXPERTS
    assert sizes["soft"] == sizes["top-1"] == sizes["top-2"]
    biases = (EXPERTS - 1) * 10  # an output bias for each expert
    assert sizes["soft"] == sizes["dense"] + router + biases


def training(balance=nothing, epochs=1, steps=20):
    return Training(heads(FEATURES)["top-1"], adamw(4e-3, steps), epochs, 8, balance)


# Each of these is compiled once for all tests.
@cache
def begun():
    return jax.jit(partial(start, training=training()))(jax.random.key(0))


@cache
def stepping():
    """A step with a balance loss of a weight, which comes first."""

    def weighted(weight, *given):
        return step(training(lambda *found: weight * of_all(*found)), *given)

    return jax.jit(weighted)


@cache
def looking():
    return jax.jit(partial(evaluate, training()))


@pytest.fixture
def eight():
    """Images with the labels 0 to 7, and the rows of all of them."""
    return Split(*jax.device_put((noise(8), np.arange(8)))), np.arange(8)


def test_steps_learn(eight, key):
    data, rows = eight
    run = first = begun()
    losses = []
    for _ in range(20):
        run, loss = stepping()(0.0, run, data, rows, key, 0)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, run)
    assert all(jax.tree.leaves((moved.params["trunk"], moved.statistics)))


def test_faithful_images_are_not_distorted(eight, key):
    data, rows = eight
    for faithful, alike in ((0, False), (7, False), (8, True)):
        losses = [
            float(stepping()(0.0, begun(), data, rows, each, faithful)[1])
            for each in jax.random.split(key, 2)
        ]
        assert (losses[0] == losses[1]) is alike


@pytest.mark.parametrize(("epochs", "distorting"), [(1, 1), (2, 1), (3, 2), (15, 10)])
def test_half_of_the_images_are_faithful_in_the_last_epochs(epochs, distorting):
    found = [int(faithful_images(training(epochs=epochs), epoch)) for epoch in range(epochs)]
    assert found == [0] * distorting + [4] * (epochs - distorting)


def test_the_balance_loss_reaches_the_router(eight, key):
    data, rows = eight
    routers = []
    for weight in (0.0, 1e3):
        run, _ = stepping()(weight, begun(), data, rows, key, 0)
        routers.append(run.params["head"]["router"]["kernel"])
    assert not np.allclose(*routers, atol=1e-6)


def test_balance_is_of_undistorted_images_once_there_are_any():
    routing = moejax.switch(jnp.array([[2.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))
    some = jnp.array([True, False, True])
    expected = moejax.load_balancing_loss(moejax.switch(routing.logits[some]))
    np.testing.assert_allclose(of_undistorted(routing, some), expected, rtol=1e-6)
    everything = moejax.load_balancing_loss(routing)
    assert abs(everything - expected) > 0.1
    np.testing.assert_allclose(of_undistorted(routing, jnp.zeros(3, bool)), everything)
    np.testing.assert_allclose(of_all(routing, some), 0.3 * everything, rtol=1e-6)


def test_tests_use_what_training_has_gathered(eight):
    data, _ = eight
    run = begun()
    show = jax.jit(partial(classify, training().head, training=False))
    other = jax.tree.map(lambda leaf: leaf + 1, run.statistics)
    found = [show(run.params, statistics, data.images)[0] for statistics in (run.statistics, other)]
    assert not np.allclose(*found)
    tested = looking()(run, data.images)["log_probabilities"]
    np.testing.assert_allclose(tested, jax.nn.log_softmax(found[0]), atol=1e-5)


def test_images_move_by_a_pixel():
    image = digit(slice(0, 3), slice(25, 28))[None]
    np.testing.assert_array_equal(shifted(image, 0, 0), image)
    np.testing.assert_array_equal(shifted(image, 1, -1)[0], digit(slice(1, 4), slice(24, 27)))
    np.testing.assert_array_equal(shifted(image, -1, 1)[0], digit(slice(0, 2), slice(26, 28)))


def test_all_images_are_tested_in_batches(eight, monkeypatch):
    data, _ = eight
    look, run = looking(), begun()
    expected = look(run, data.images)
    monkeypatch.setattr(trunk_testing, "AT_ONCE", 3)
    found = evaluate_all(look, run, np.asarray(data.images))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


def test_the_blend_is_of_nine_shifts(eight):
    data, _ = eight
    look, run = looking(), begun()
    images = np.pad(np.asarray(data.images)[:, 2:-2, 2:-2], ((0, 0), (2, 2), (2, 2)))
    views = [
        np.roll(images, shift, (1, 2)) for shift in [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    ]
    expected = np.mean([look(run, view)["log_probabilities"] for view in views], axis=0)
    np.testing.assert_allclose(blended(look, run, images), expected, atol=1e-5)
    assert accuracy(np.log(np.eye(10)[[3, 4]] + 0.1), np.array([3, 5])) == 50


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_the_rate_is_finite_and_falls_to_nothing(steps):
    updates = adamw(1.0, steps)
    params = {"w": np.float32(1)}
    state, sizes = jax.jit(updates.init)(params), []
    update = jax.jit(updates.update)
    for _ in range(steps):
        found, state = update(params, state, params)
        sizes.append(abs(float(found["w"])))
    assert np.isfinite(sizes).all()
    assert steps < 100 or max(sizes) > 0.9 > 0.1 > sizes[-1]
