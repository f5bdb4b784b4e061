"""Weights on disk: exact, and never silently wrong."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import params_of
from disk import file_size_limit
from moejax.interop import safetensors as weights
from moejax.interop import torch as conversion
from moejax.interop import transformers as published

pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_round_trip_is_exact(path, dtype):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    weights.save(path, {"array": array, "transposed": array.T, "scalar": array[0, 1]})
    loaded = weights.load(path)
    assert set(loaded) == {"array", "transposed", "scalar"}
    for name, expected in {"array": array, "transposed": array.T, "scalar": array[0, 1]}.items():
        assert loaded[name].dtype == expected.dtype
        np.testing.assert_array_equal(loaded[name], expected)


def test_a_mixture_goes_through_a_file(path):
    layer = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 3), num_experts=3)
    layout = conversion.moe(conversion.glu(4, 8), conversion.linear(4, 3), num_experts=3)
    params = params_of(layer)
    weights.save(path, conversion.to_torch(layout, params))
    loaded = conversion.from_torch(layout, weights.load(path))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_no_flipped_bit_goes_unnoticed(path):
    weights.save(path, {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(2)})
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            weights.load(path)


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_truncated_file_is_named(path, length):
    weights.save(path, {"weight": np.ones((2, 3))})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"weights.safetensors is damaged"):
        weights.load(path)


def test_a_file_from_elsewhere_is_refused(path):
    from safetensors.numpy import save_file

    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match="no checksum"):
        weights.load(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_a_file_from_elsewhere_is_not_damaged_whatever_its_dtype(path, dtype):
    import safetensors

    size = 8 if dtype == "C64" else 1
    header = {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * size))
    assert len(safetensors.deserialize(path.read_bytes())) == 1
    with pytest.raises(ValueError, match="has no checksum"):
        weights.load(path)


def test_a_failed_save_leaves_the_old_file(path):
    weights.save(path, {"weight": np.ones(3)})
    with pytest.raises(ValueError, match="dtypes"):
        weights.save(path, {"weight": np.ones(3, dtype=object)})
    np.testing.assert_array_equal(weights.load(path)["weight"], np.ones(3))


def test_a_full_disk_leaves_the_old_file(path):
    weights.save(path, {"weight": np.ones(3)})
    with file_size_limit(1000), pytest.raises(OSError, match="too large"):
        weights.save(path, {"weight": np.zeros(1000)})
    np.testing.assert_array_equal(weights.load(path)["weight"], np.ones(3))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">f2"])
def test_the_other_byte_order_is_read_back_as_the_same_numbers(path, dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    weights.save(path, {"array": array})
    loaded = weights.load(path)["array"]
    assert loaded.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize(
    "array",
    [
        jnp.ones(2, jnp.float8_e4m3fn),
        jnp.ones(2, jnp.float8_e5m2),
        jnp.ones(2, jnp.int4),
        np.ones(2, np.complex64),
        np.array(["a"]),
        {"nested": np.ones(2)},
        None,
    ],
)
def test_what_could_not_be_read_is_not_written(path, array):
    with pytest.raises(ValueError, match=f"got {{'odd': '{np.array(array).dtype.name}'}}"):
        weights.save(path, {"odd": array, "weight": np.ones(3)})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", [1, ("a", "b"), "__metadata__"])
def test_names_are_strings(path, name):
    with pytest.raises(ValueError, match=re.escape(f"got [{name!r}]")):
        weights.save(path, {name: np.ones(3)})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("written", ["~/a b", "file://{home}/a%20b", "file:{home}/a%20b"])
def test_a_path_by_its_other_names(tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    weights.save(written.format(home=tmp_path), {"x": np.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]
    np.testing.assert_array_equal(weights.load(written.format(home=tmp_path))["x"], np.ones(2))


@pytest.mark.parametrize("address", ["s3://bucket/w", "gs://w", Path("s3://bucket/w")])
def test_an_address_elsewhere_is_refused_by_name(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    uses = [
        lambda: weights.save(address, {"x": np.ones(1)}),
        lambda: weights.load(address),
        lambda: published.block(address),
        lambda: published.load(address, 0),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"on this machine.*got {address}"):
            use()
    assert not list(tmp_path.iterdir())
