"""The study of heads on a convolutional trunk: distortion, what a run measures, the command."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from commands import refusal, run
from data import Split
from mnist_files import write_small_mnist
from parts.routes import nothing
from studies import heads_report, trunk
from studies.heads import EXPERTS, heads
from studies.trunk import FEATURES, Trunk, distorted
from studies.trunk_training import Training, adamw, classify, evaluate, start, step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def digit(row=slice(8, 20), column=slice(12, 15)):
    """A white bar on black."""
    image = np.zeros((28, 28), np.uint8)
    image[row, column] = 255
    return image


def exactly(monkeypatch, degrees=0, scale=0, pixels=0):
    """Distorts every image as far as it goes, in the same direction."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.ones(shape))
    for name, value in {"DEGREES": degrees, "SCALE": scale, "PIXELS": pixels}.items():
        monkeypatch.setattr(trunk, name, value)


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
    found = distorted(key, jnp.asarray(digit())[None])[0]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_scale_moves_towards_the_centre(monkeypatch, key):
    exactly(monkeypatch, scale=1)  # every pixel is read from twice as far
    found = distorted(key, jnp.asarray(digit(slice(4, 24), slice(12, 16)))[None])[0]
    assert found.sum() == pytest.approx(255 * 20 * 4 / 4, rel=0.05)


def test_every_image_has_chances_of_its_own(key):
    found = distorted(key, jnp.asarray(np.stack([digit()] * 3)))
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])
    assert 0 <= found.min() < found.max() < 255.1


def test_features_are_normalised_in_training_alone(key):
    images = jax.random.randint(key, (6, 28, 28), 0, 256).astype(jnp.uint8)
    variables = Trunk().init(key, images, training=False)
    features, moved = Trunk().apply(variables, images, training=True, mutable=["batch_stats"])
    assert features.shape == (6, FEATURES)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    before, after = variables["batch_stats"], moved["batch_stats"]
    assert not np.allclose(*(each["BatchNorm_0"]["mean"] for each in (before, after)))
    alone = Trunk().apply(variables, images[:1], training=False)
    np.testing.assert_allclose(
        alone, Trunk().apply(variables, images, training=False)[:1], atol=1e-5
    )


MACHINE = {"cores": "2", "processor": "a processor"}
OPTIONS = "--epochs 2 --batch-size 10 --seeds 1 --no-cache --heads dense top-1".split()


def test_the_command_ends_with_tables_and_goes_on(tmp_path, capsys):
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
    capsys.readouterr()

    run("heads", *options, "--resume", "--docs", str(tmp_path))
    for text in (capsys.readouterr().out, page.read_text()):
        assert "| head | seeds | published | ours, best epoch | ours, last epoch | minus" in text
        assert "| dense | 1 | 99.65 |" in text
    assert (tmp_path / "out" / "heads.png").stat().st_size > 10_000
    message = refusal("heads", *options, "--resume", "--learning-rate", "0.2", capsys=capsys)
    assert "--learning-rate must be what the run began with, 0.004" in message


def test_too_few_images_are_refused(tmp_path, capsys):
    folder = str(write_small_mnist(tmp_path / "data").folder)
    message = refusal("heads", "--data-dir", folder, "--out", str(tmp_path / "out"), capsys=capsys)
    assert "--batch-size must be at most the number of training images, 30, got 128" in message


def test_the_summary_says_what_was_measured():
    load = np.full((2, 3, EXPERTS), 1 / EXPERTS)
    load[1, -1, :2] = 0.1, 0.15
    accuracy = np.array([[90, 99.7, 99.6], [90, 99.5, 99.4]])
    measured = {
        "dense": {"accuracy": accuracy, "loss": 1 - accuracy / 100},
        "top-1": {"accuracy": accuracy + 0.1, "loss": 1 - accuracy / 100, "load": load},
    }
    summary = heads_report.summarize(measured)
    assert summary["cells"]["dense"]["accuracy"]["mean"] == pytest.approx(99.5)
    assert summary["cells"]["dense"]["best"]["mean"] == pytest.approx(99.6)
    assert summary["cells"]["top-1"]["smallest"]["values"] == pytest.approx([1, 0.8])
    assert summary["cells"]["top-1"]["largest"]["values"] == pytest.approx([1, 1.2])
    assert summary["differences"]["top-1"]["values"] == pytest.approx([0.1, 0.1])
    text = heads_report.render(summary | {"seconds": 90.0, "versions": MACHINE})
    assert "| dense | 2 | 99.65 | 99.60 [98.33, 100.87] | 99.50 ± 0.14 [98.23, 100.77] |  |" in text
    assert "Better than dense, by an interval that leaves out zero: top-1; worse: no head." in text
    assert "The load farthest from even, of any head and seed, is 20.0% off." in text
    alone = heads_report.summarize({"dense": measured["dense"]})
    text = heads_report.render(alone | {"seconds": 90.0, "versions": MACHINE})
    assert "Loads" not in text
    assert "Better" not in text


def test_all_heads_are_of_equal_size(key):
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(head.layer.init, key)))
        for name, head in heads(FEATURES).items()
    }
    router = FEATURES * EXPERTS + EXPERTS
    assert sizes["soft"] == sizes["top-1"] == sizes["top-2"]
    biases = (EXPERTS - 1) * 10  # an output bias for each expert
    assert sizes["soft"] == sizes["dense"] + router + biases


def training(name="top-1", balance=nothing, epochs=1, steps=20):
    head = heads(FEATURES, balance)[name]
    return Training(head, adamw(4e-3, steps), epochs, batch_size=8)


@pytest.fixture
def eight(key):
    """Images with the labels 0 to 7, and the rows of all of them."""
    images = jax.random.randint(key, (8, 28, 28), 0, 256).astype(jnp.uint8)
    return Split(images, jnp.arange(8)), jnp.arange(8)


def test_steps_learn(eight, key):
    data, rows = eight
    go_on = jax.jit(partial(step, training()))
    run = first = start(key, training())
    losses = []
    for _ in range(20):
        run, loss = go_on(run, data, rows, key)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, run)
    assert all(jax.tree.leaves((moved.params["trunk"], moved.statistics)))


def test_the_balance_loss_reaches_the_router(eight, key):
    data, rows = eight
    routers = []
    for balance in (nothing, lambda routing: 1e3 * moejax.load_balancing_loss(routing)):
        way = training(balance=balance)
        run, _ = jax.jit(partial(step, way))(start(key, way), data, rows, key)
        routers.append(run.params["head"]["router"]["kernel"])
    assert not np.allclose(*routers, atol=1e-6)


def test_tests_use_what_training_has_gathered(eight, key):
    data, _ = eight
    run = start(key, training("dense"))
    head, params = training("dense").head, run.params
    other = jax.tree.map(lambda leaf: leaf + 1, run.statistics)
    found = [
        classify(head, params, statistics, data.images, training=False)[0]
        for statistics in (run.statistics, other)
    ]
    assert not np.allclose(*found)
    assert evaluate(training("dense"), run, data)["accuracy"] == 100 * jnp.mean(
        jnp.argmax(found[0], axis=-1) == data.labels
    )


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_the_rate_is_finite_and_falls_to_nothing(steps):
    updates = adamw(1.0, steps)
    params = {"w": jnp.ones(())}
    state, sizes = updates.init(params), []
    for _ in range(steps):
        found, state = updates.update(params, state, params)
        sizes.append(abs(float(found["w"])))
    assert np.isfinite(sizes).all()
    assert steps < 100 or max(sizes) > 0.9 > 0.1 > sizes[-1]
