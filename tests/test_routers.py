"""Routers and what wraps them, on definitions and through `moe`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, params_of
from reference import check_gradients

X = normal(0, 5, 4)
IDENTITY = moejax.Layer(lambda key: {}, lambda params, x: x)


def test_cosine_is_the_cosine():
    router = moejax.cosine(4, 6, 3)
    params = jax.jit(router.init)(jax.random.key(0))
    projected = np.asarray(moejax.linear(4, 6).apply(params["projection"], X), np.float64)
    directions = np.asarray(params["directions"], np.float64)
    cosines = projected @ directions
    cosines /= np.linalg.norm(projected, axis=1)[:, None] * np.linalg.norm(directions, axis=0)
    logits = jax.jit(router.apply)(params, X)
    np.testing.assert_allclose(logits, 2 * cosines, rtol=1e-5, atol=1e-6)


def test_cosine_scale_is_held_at_100():
    router = moejax.cosine(4, 6, 3)
    params, apply = params_of(router), jax.jit(router.apply)
    largest = apply({**params, "log_scale": np.float32(50.0)}, X)
    at_limit = apply({**params, "log_scale": np.float32(np.log(100.0))}, X)
    np.testing.assert_allclose(largest, at_limit, rtol=1e-6)


@pytest.mark.parametrize("router", [moejax.cosine(4, 6, 3), moejax.slots(4, 3, 2)])
def test_gradients_in_float64(router, x64):
    check_gradients(router.apply, *jax.tree.map(np.float64, (params_of(router), X)))


@pytest.mark.parametrize("router", [moejax.cosine(4, 6, 3), moejax.slots(4, 3, 2)])
def test_gradient_is_finite_at_a_zero_token(router):
    params = jax.tree.map(np.zeros_like, params_of(router))
    total = lambda params, x: router.apply(params, x).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(params, np.zeros((1, 4), np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("make", [partial(moejax.cosine, 4, 6, 3), partial(moejax.slots, 4, 3, 2)])
def test_params_may_start_in_another_dtype(make):
    params = jax.jit(make(param_dtype=jnp.bfloat16).init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    like = jax.eval_shape(make().init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like)
    exact, apply = jax.tree.map(np.float32, params), jax.jit(make().apply)
    np.testing.assert_array_equal(apply(params, X), apply(exact, X))


def test_jitter_is_bounded_uniform_and_off_without_key():
    router = moejax.jittered(IDENTITY, epsilon=0.1)
    x = np.ones((400, 25), np.float32)
    np.testing.assert_array_equal(router.apply({}, x), x)
    u = np.asarray(router.apply({}, x, key=jax.random.key(0)))
    assert 0.9 <= u.min() < 0.901
    assert 1.099 < u.max() <= 1.1
    np.testing.assert_allclose(np.std(u), 0.2 / np.sqrt(12), rtol=0.02)


def test_wrappers_compose_with_each_other_and_with_a_noisy_router():
    noisy = moejax.noisy(moejax.linear(4, 3), moejax.linear(4, 3))
    wrapped = moejax.jittered(
        moejax.soft_capped(moejax.tempered(noisy, temperature=0.5), cap=1.5), epsilon=0.1
    )
    params = params_of(wrapped)
    logits, scale = wrapped.apply(params, X)
    clean, clean_scale = noisy.apply(params, X)
    np.testing.assert_allclose(logits, 1.5 * np.tanh(np.asarray(clean) / 0.5 / 1.5), rtol=1e-5)
    np.testing.assert_array_equal(scale, clean_scale)


def test_the_scale_of_noise_is_a_softplus_above_a_hundredth():
    x = jnp.array([[-30.0, -1.0, 0.0, 2.0]])
    _, scale = moejax.noisy(IDENTITY, IDENTITY).apply({"router": {}, "noise": {}}, x)
    np.testing.assert_allclose(scale, np.log1p(np.exp(np.asarray(x))) + 1e-2, rtol=1e-6)


def test_every_wrapper_passes_the_key_on():
    wrapped = moejax.soft_capped(moejax.jittered(IDENTITY, epsilon=0.5), cap=30.0)
    wrapped = moejax.jittered(moejax.tempered(wrapped, temperature=2.0), epsilon=0.0)
    plain = wrapped.apply({}, X)
    assert not np.array_equal(wrapped.apply({}, X, key=jax.random.key(0)), plain)


def test_a_noisy_router_passes_the_key_on_to_both():
    jitter = moejax.jittered(IDENTITY, epsilon=0.5)
    params = {"router": {}, "noise": {}}
    plain = moejax.noisy(IDENTITY, IDENTITY).apply(params, X)
    without_key = moejax.noisy(jitter, jitter).apply(params, X)
    jax.tree.map(np.testing.assert_array_equal, without_key, plain)
    for routers, moved in (
        ((jitter, IDENTITY), (True, False)),
        ((IDENTITY, jitter), (False, True)),
    ):
        outputs = moejax.noisy(*routers).apply(params, X, key=jax.random.key(0))
        same = tuple(map(np.array_equal, outputs, plain))
        assert same == tuple(not one for one in moved)


def test_a_wrapped_router_serves_any_rule():
    router = moejax.tempered(moejax.jittered(moejax.linear(4, 3), epsilon=0.1), temperature=2.0)
    for route in (moejax.softmax, partial(moejax.top_k, k=2), moejax.relu, moejax.sinkhorn):
        layer = moejax.moe(moejax.linear(4, 2), router, num_experts=3, route=route)
        y, _ = jax.eval_shape(layer.apply, params_of(layer), X, key=jax.random.key(1))
        assert y.shape == (5, 2)


@pytest.mark.parametrize("value", [1.0, -1.0, float("nan")])
def test_jitter_keeps_the_sign(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        moejax.jittered(IDENTITY, epsilon=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), np.float32(-1)])
def test_bounds_must_be_positive(value):
    with pytest.raises(ValueError, match="positive"):
        moejax.tempered(IDENTITY, temperature=value)
    with pytest.raises(ValueError, match="positive"):
        moejax.soft_capped(IDENTITY, cap=value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bounds_may_be_traced(dtype):
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_logits(value):
        router = moejax.soft_capped(moejax.tempered(IDENTITY, temperature=value), cap=value)
        logits = router.apply({}, X.astype(dtype))
        return jnp.abs(logits).sum().astype(jnp.float32), logits

    gradient, traced = jax.device_get(gradient_and_logits(np.float32(0.5)))
    assert traced.dtype == dtype
    expected = 0.5 * np.tanh(np.asarray(X, np.float64) / 0.25)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(traced.astype(np.float32), expected, rtol=9 * eps, atol=eps)
    assert gradient > 0


@pytest.mark.parametrize("value", [-4, 0, 1.5])
def test_sizes_of_routers_are_positive_integers(value):
    for router in (moejax.cosine, moejax.slots):
        with pytest.raises(ValueError, match=r"widths of .* must be positive integers"):
            router(value, 4, 2)
    with pytest.raises(ValueError, match=r"widths of .* must be positive integers"):
        moejax.cosine(3, value, 2)
    with pytest.raises(ValueError, match=f"`num_experts` .* got {value}"):
        moejax.cosine(3, 4, value)
    with pytest.raises(ValueError, match=f"`num_experts` .* got {value}"):
        moejax.slots(3, value, 2)
    with pytest.raises(ValueError, match=f"`slots_per_expert` .* got {value}"):
        moejax.slots(3, 4, value)
