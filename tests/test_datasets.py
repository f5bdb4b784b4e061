"""The toy problem, the layouts, the digits of scikit-learn and the choice between sources."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data as datasets
from commands import EXPERIMENTS
from data import loaders


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    """No folder named in the environment, an empty cache, and no network."""
    monkeypatch.delenv("MOEJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))

    def offline(folder):
        raise ConnectionError("MNIST could not be downloaded: no route")

    monkeypatch.setattr(loaders, "download", offline)


# The toy problem


def test_toy_matches_its_definition_point_by_point(key):
    x, y = datasets.toy(key, 101)
    noise = np.asarray(jax.random.normal(key, (101, 2), jnp.float32), np.float64)
    for i in range(101):
        point = noise[i] + ([3, 2] if i % 2 == 0 else [-3, 2])
        np.testing.assert_allclose(x[i], point - [0, 2], atol=1e-6)
        assert y[i] == float(np.hypot(*point) > np.sqrt(13))


def test_toy_has_two_clouds_of_unit_variance_and_both_labels(key):
    x, y = datasets.toy(key, 20_000)
    for cloud, mean in ((x[::2], [3.0, 0.0]), (x[1::2], [-3.0, 0.0])):
        np.testing.assert_allclose(cloud.mean(0), mean, atol=0.05)
        np.testing.assert_allclose(np.cov(cloud.T), np.eye(2), atol=0.05)
    assert 0.4 < y.mean() < 0.6


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_toy_sizes_types_and_balance(key, num_samples):
    x, y = datasets.toy(key, num_samples)
    assert x.shape == (num_samples, 2)
    assert y.shape == (num_samples,)
    assert x.dtype == y.dtype == jnp.float32
    assert set(np.unique(y)) <= {0.0, 1.0}


def test_toy_is_reproducible_and_compiles(key):
    first, again = datasets.toy(key, 50), jax.jit(datasets.toy, static_argnums=1)(key, 50)
    np.testing.assert_allclose(first.x, again.x, rtol=1e-6)
    np.testing.assert_array_equal(first.y, again.y)
    assert not np.array_equal(first.x, datasets.toy(jax.random.key(1), 50).x)


def test_toy_stays_float32_in_double_precision(key, x64):
    assert {leaf.dtype for leaf in datasets.toy(key, 3)} == {jnp.dtype(jnp.float32)}


def test_toy_refuses_no_points(key):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        datasets.toy(key, 0)


# Layouts

LAYOUTS = {
    datasets.flat: (784,),
    datasets.channels_first: (1, 28, 28),
    datasets.channels_last: (28, 28, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_layouts_agree_on_numpy_and_inside_jit(layout, leading):
    images = np.random.default_rng(0).integers(0, 256, (*leading, 28, 28), np.uint8)
    images.flat[:2] = 0, 255
    plain = layout(images)
    assert isinstance(plain, np.ndarray)
    assert plain.dtype == np.float32
    assert plain.shape == leading + LAYOUTS[layout]
    assert (plain.min(), plain.max()) == (0, 1)
    np.testing.assert_array_equal(plain.ravel(), images.ravel().astype(np.float32) / 255)
    compiled = jax.jit(layout)(images)
    assert compiled.dtype == jnp.float32
    np.testing.assert_allclose(compiled, plain, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_refuse_what_is_laid_out_already(layout):
    with pytest.raises(ValueError, match=r"must be uint8.*float32"):
        layout(np.zeros((2, 28, 28), np.float32))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_one_hot_agrees_with_jax_inside_jit(dtype):
    labels = np.array([[0, 9], [3, 3]], dtype)
    expected = jax.nn.one_hot(labels, 10)
    for vectors in (datasets.one_hot(labels), jax.jit(datasets.one_hot)(labels)):
        assert vectors.dtype == jnp.float32
        np.testing.assert_array_equal(vectors, expected)


# The digits of scikit-learn


def test_digits_are_mnist_in_form():
    data = datasets.digits()
    assert (data.name, data.notice) == ("digits", "")
    for split, size in ((data.train, 1437), (data.test, 360)):
        assert split.images.shape == (size, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert set(split.labels) == set(range(10))
        assert (split.images.min(), split.images.max()) == (0, 255)


def test_digits_match_a_slow_interpolation():
    from sklearn.datasets import load_digits

    small = load_digits().images[0]
    large = datasets.digits().train.images[0]
    for row, column in ((0, 0), (3, 17), (13, 14), (27, 27), (9, 20)):
        y, x = (np.clip((i + 0.5) * 8 / 28 - 0.5, 0, 7) for i in (row, column))
        y0, x0 = min(int(y), 6), min(int(x), 6)
        top = small[y0, x0] * (1 - x + x0) + small[y0, x0 + 1] * (x - x0)
        bottom = small[y0 + 1, x0] * (1 - x + x0) + small[y0 + 1, x0 + 1] * (x - x0)
        value = (top * (1 - y + y0) + bottom * (y - y0)) * 255 / 16
        assert abs(int(large[row, column]) - value) <= 0.5 + 1e-9


# The choice between sources


def test_load_falls_back_to_digits_and_says_so_in_a_box(capsys):
    data = datasets.load()
    printed = capsys.readouterr().out
    assert data.name == "digits"
    assert data.notice.strip() == printed.strip()
    for words in ("THIS IS NOT MNIST", "no route", "1,437", "MOEJAX_DATA_DIR"):
        assert words in printed
    assert len({len(line) for line in printed.splitlines()}) == 1


def test_mnist_fails_offline_and_says_what_to_do():
    with pytest.raises(ConnectionError, match=r"no route.*MOEJAX_DATA_DIR"):
        datasets.mnist()


@pytest.mark.parametrize("loader", [datasets.mnist, datasets.load])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_folder_that_is_given_is_never_passed_over(loader, by_environment, monkeypatch, tmp_path):
    missing = str(tmp_path / "nowhere")
    if by_environment:
        monkeypatch.setenv("MOEJAX_DATA_DIR", missing)
    with pytest.raises(ValueError, match="nowhere must be a folder"):
        loader(None if by_environment else missing)


def test_scikit_learn_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'moejax\[experiments\]'"):
        datasets.digits()


def test_importing_loads_nothing_optional():
    code = (
        "import sys, data, parts.progress; "
        "print([m for m in ('PIL', 'sklearn', 'tensorflow_datasets', 'tqdm') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXPERIMENTS
    )
    assert out.stdout.strip() == "[]"
