"""Flax modules, Linen and NNX, as experts and as routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import moejax
from cases import D, E, O, T, normal
from moejax.interop.flax import from_linen, from_nnx


class LinenExpert(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(O)(jnp.tanh(linen.Dense(5)(x)))


class Dropping(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(linen.Dense(O)(x))


class NnxExpert(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, 5, rngs=rngs), nnx.Linear(5, O, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


EXPERTS = {
    "linen": from_linen(LinenExpert(), jnp.ones((1, D))),
    "nnx": from_nnx(lambda rngs: NnxExpert(rngs)),
}


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("route", [moejax.softmax, moejax.switch])
def test_a_module_is_an_expert(expert, route, key):
    layer = moejax.moe(expert, moejax.linear(D, E), num_experts=E, route=route)
    params = layer.init(key)
    x = normal(0, T, D)
    y, routing = jax.jit(layer.apply)(params, x)
    experts, x, routing = jax.device_get((params["experts"], x, routing))
    one, expected = jax.jit(expert.apply), np.zeros((T, O), np.float32)
    for k in range(routing.experts.shape[1]):
        for t in range(T):
            own = jax.tree.map(lambda leaf, e=routing.experts[t, k]: leaf[e], experts)
            expected[t] += routing.weights[t, k] * one(own, x[t])
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    kernels = [leaf for leaf in jax.tree.leaves(experts) if leaf.ndim == 3]
    assert all(not np.array_equal(kernel[0], kernel[1]) for kernel in kernels)
    gradients = jax.eval_shape(jax.grad(lambda p: layer.apply(p, x)[0].sum()), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS)
def test_a_module_is_traced_once_without_jit(expert, key):
    layer = moejax.moe(expert, moejax.linear(D, E), num_experts=E)
    params, x = layer.init(key), normal(0, T, D)
    y, _ = layer.apply(params, x)
    with jax.no_tracing():
        np.testing.assert_array_equal(layer.apply(params, x)[0], y)


def test_a_module_is_a_router(key):
    router = from_nnx(lambda rngs: nnx.Linear(D, E, rngs=rngs))
    layer = moejax.moe(moejax.linear(D, O), router, num_experts=E)
    y, _ = jax.eval_shape(lambda key: layer.apply(layer.init(key), jnp.ones((T, D))), key)
    assert y.shape == (T, O)


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda key: from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs)), "BatchStat"),
        (lambda key: from_nnx(lambda rngs: nnx.Dropout(0.5, rngs=rngs)), "RngKey"),
        (
            lambda key: from_linen(
                linen.BatchNorm(use_running_average=False), jnp.ones((1, 3))
            ).init(key),
            "batch_stats",
        ),
        (
            from_linen(linen.Dropout(0.5, deterministic=False), jnp.ones((1, 3))).init,
            "random stream",
        ),
        (
            moejax.stack(from_linen(Dropping(), jnp.ones((1, D))), E).init,
            r"Dropping also has \['a random stream'\]",
        ),
    ],
)
def test_a_module_with_other_state_is_refused(make, state, key):
    with pytest.raises(ValueError, match=state):
        make(key)


def test_a_module_whose_dropout_is_off_is_an_expert(key):
    module = linen.Sequential([linen.Dense(O), linen.Dropout(0.5, deterministic=True)])
    expert = from_linen(module, jnp.ones((1, D)))
    y = jax.eval_shape(lambda key: expert.apply(expert.init(key), jnp.ones((T, D))), key)
    assert y.shape == (T, O)


def test_a_module_that_is_made_already_is_refused():
    made = nnx.Linear(D, O, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"got a Linear already made: pass lambda rngs: Linear"):
        from_nnx(made)
