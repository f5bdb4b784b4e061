"""A trained mixture in use: exported, one token at a time, in bfloat16, with and without drops."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import D, E, normal, params_of
from pages import code_of

TOP_2 = partial(moejax.top_k, k=2)
LAYER = moejax.moe(moejax.glu(D, 6), moejax.linear(D, E), num_experts=E, route=TOP_2)


@pytest.fixture
def params():
    return params_of(LAYER)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_of("inference.md"), names)
    params, ones = names["params"], names["jnp"].ones((8, 16))
    np.testing.assert_array_equal(
        names["program"].call(params, ones), jax.jit(names["layer"].apply)(params, ones)[0]
    )


def test_export_from_a_checkpoint_and_back(params, key, tmp_path):
    moejax.checkpoint.save(tmp_path / "run", params, step=1)
    like = jax.eval_shape(LAYER.init, key)
    restored = moejax.checkpoint.restore(tmp_path / "run", like).state
    x = normal(0, 10, D)
    apply = jax.jit(lambda params, x: LAYER.apply(params, x)[0])
    program = jax.export.export(apply)(like, x)
    (tmp_path / "layer").write_bytes(program.serialize())
    read = jax.export.deserialize(bytearray((tmp_path / "layer").read_bytes()))
    np.testing.assert_array_equal(read.call(restored, x), apply(params, x))


def test_export_for_other_platforms(params):
    x = normal(0, 10, D)
    apply = jax.jit(lambda params, x: LAYER.apply(params, x)[0])
    program = jax.export.export(apply, platforms=["cpu", "cuda", "tpu"])(params, x)
    read = jax.export.deserialize(program.serialize())
    assert read.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_allclose(read.call(params, x), apply(params, x), rtol=1e-6, atol=1e-6)


def test_one_token_is_the_row_of_many(params):
    x, step = np.asarray(normal(0, 12, D)), jax.jit(LAYER.apply)
    every, routing = jax.device_get(step(params, x))
    for row in range(3):
        y, decision = jax.device_get(step(params, x[row : row + 1]))
        np.testing.assert_allclose(y[0], every[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(decision.experts[0], routing.experts[row])


def test_one_token_reads_its_own_experts_alone(params):
    """A product with an expert that was not chosen would spread what is planted in it."""
    x = normal(0, 1, D)
    apply = jax.jit(LAYER.apply)
    y, routing = apply(params, x)
    unread = ~np.isin(np.arange(E), routing.experts)[:, None, None]
    planted = jax.tree.map(
        lambda leaf: np.where(unread, np.float32(np.nan), leaf), params["experts"]
    )
    np.testing.assert_array_equal(apply({**params, "experts": planted}, x)[0], y)


def test_bfloat16_from_float32(params):
    x, apply = np.asarray(normal(0, 12, D)), jax.jit(LAYER.apply)
    expected, exact = jax.device_get(apply(params, x))
    cast = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    for own in (params, {**cast, "router": params["router"]}):
        y, routing = jax.device_get(apply(own, x.astype(jnp.bfloat16)))
        assert y.dtype == jnp.bfloat16
        assert routing.weights.dtype == routing.logits.dtype == jnp.float32
        agree = (routing.experts == exact.experts).all(axis=-1)
        assert agree.mean() > 0.8
        np.testing.assert_allclose(np.float32(y[agree]), expected[agree], rtol=0.05, atol=0.02)


def test_capacity_depends_on_the_batch_and_the_default_does_not(params):
    x = np.tile(normal(0, 1, D), (12, 1))  # all want the same experts
    alone, _ = LAYER.apply(params, x[:1])
    limited = partial(moejax.moe, moejax.glu(D, 6), moejax.linear(D, E), num_experts=E, route=TOP_2)
    dropping = limited(execute=partial(moejax.capacity, factor=1.0))
    y, _ = dropping.apply(params, x)
    np.testing.assert_allclose(np.asarray(y)[:1], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[-1], 0)
    np.testing.assert_allclose(dropping.apply(params, x[:1])[0], alone, rtol=1e-5, atol=1e-6)
    roomy = limited(execute=partial(moejax.capacity, factor=E / 2))
    for layer in (LAYER, roomy):
        every, _ = layer.apply(params, x)
        np.testing.assert_allclose(every, np.broadcast_to(alone, every.shape), rtol=1e-5, atol=1e-6)
