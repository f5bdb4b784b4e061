"""Two layers that are made in the same way are equal, so that JAX traces one of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from cases import D, E, T, normal, params_of
from moejax._calling import accepts
from moejax.interop.flax import to_nnx

MAKERS = {
    "linear": lambda: moejax.linear(D, E, bias=False),
    "mlp": lambda: moejax.mlp(D, 5, D, layer=partial(moejax.linear, bias=False)),
    "glu": lambda: moejax.glu(D, 5),
    "stack": lambda: moejax.stack(moejax.glu(D, 5), E),
    "noisy": lambda: moejax.noisy(moejax.linear(D, E), moejax.linear(D, E)),
    "biased": lambda: moejax.biased(moejax.linear(D, E), E),
    "cosine": lambda: moejax.cosine(D, 4, E),
    "slots": lambda: moejax.slots(D, E, 2),
    "jittered": lambda: moejax.jittered(moejax.linear(D, E), epsilon=0.1),
    "tempered": lambda: moejax.tempered(moejax.linear(D, E), temperature=2.0),
    "soft_capped": lambda: moejax.soft_capped(moejax.linear(D, E), cap=30.0),
    "moe": lambda: moejax.moe(
        moejax.glu(D, 5), moejax.linear(D, E), num_experts=E, route=partial(moejax.top_k, k=2)
    ),
    "scale_inputs": lambda: moejax.moe(
        moejax.glu(D, 5),
        moejax.linear(D, E),
        num_experts=E,
        execute=moejax.scale_inputs(moejax.dropless),
    ),
    "with_shared": lambda: moejax.with_shared(MAKERS["moe"](), moejax.glu(D, 3)),
    "outputs_of": lambda: moejax.outputs_of(MAKERS["moe"]()),
    "networks": lambda: moejax.networks(moejax.glu(D, 5), E),
    "zero_experts": lambda: moejax.zero_experts(2),
    "moe_of": lambda: moejax.moe_of(
        moejax.networks(moejax.glu(D, 5), E - 1),
        moejax.constant_experts(1, D),
        router=moejax.linear(D, E),
        route=partial(moejax.top_k, k=2),
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_equally_made_layers_are_equal(make):
    assert make() == make()
    assert hash(make()) == hash(make())


def test_others_are_not():
    layers = [make() for make in MAKERS.values()]
    assert len(set(layers)) == len(layers)
    assert moejax.linear(D, E) != moejax.linear(D, E, bias=False)
    assert moejax.linear(D, E).init != moejax.linear(D, E).apply
    one, two = (partial(moejax.top_k, k=k) for k in (1, 2))
    make = partial(moejax.moe, moejax.glu(D, 5), moejax.linear(D, E), num_experts=E)
    assert make(route=one) != make(route=two)
    assert moejax.tempered(moejax.linear(D, E), temperature=jnp.ones(())) != moejax.tempered(
        moejax.linear(D, E), temperature=jnp.ones(())
    )


def test_one_trace_for_equal_layers():
    traces = []

    @partial(jax.jit, static_argnums=0)
    def run(layer, params, x):
        traces.append(layer)
        return layer.apply(params, x)

    params, x = params_of(MAKERS["moe"]()), jnp.ones((T, D))
    for _ in range(2):
        run(MAKERS["moe"](), params, x)
    assert len(traces) == 1


def test_one_trace_for_modules_of_equal_layers():
    traces = []

    @nnx.jit
    def run(module, x):
        traces.append(module)
        return module(x)

    for seed in range(2):
        run(to_nnx(MAKERS["moe"](), rngs=nnx.Rngs(seed)), jnp.ones((T, D)))
    assert len(traces) == 1


def test_signatures_are_kept():
    assert accepts(MAKERS["noisy"]().apply, "key")
    assert not accepts(MAKERS["linear"]().apply, "key")
    assert accepts(MAKERS["linear"]().apply, "matmul")


def test_a_traced_argument_is_taken():
    router = moejax.linear(D, E)
    params = params_of(router)

    @jax.jit
    def run(temperature):
        layer = moejax.tempered(router, temperature=temperature)
        return layer.apply(params, jnp.ones((T, D)))

    np.testing.assert_allclose(run(jnp.float32(2)) * 2, run(jnp.float32(1)), rtol=1e-6)


@pytest.mark.parametrize("route", [moejax.softmax, partial(moejax.top_k, k=2)], ids=["all", "two"])
def test_a_mixture_of_mixtures(route):
    networks, router = moejax.linear(D, D), moejax.linear(D, 3)
    inner = partial(moejax.moe, networks, router, num_experts=3, route=route)
    outer = partial(moejax.moe, router=moejax.linear(D, E), num_experts=E, route=route)
    layer = outer(moejax.outputs_of(inner()))
    oracle = outer(moejax.outputs_of(inner(execute=moejax.dense)), execute=moejax.dense)
    params, x = params_of(layer), normal(0, T, D)
    loss = lambda apply, params: jnp.sum(apply(params, x)[0] ** 2)  # noqa: E731
    actual, gradients = jax.jit(jax.value_and_grad(partial(loss, layer.apply)))(params)
    expected, wanted = jax.jit(jax.value_and_grad(partial(loss, oracle.apply)))(params)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_decision_is_refused_whatever_its_rows():
    layer = moejax.outputs_of(moejax.linear(D, 2))
    with pytest.raises(ValueError, match="returns its output alone"):
        layer.apply(params_of(layer), jnp.ones((2, D)))


def test_a_mixture_as_it_is_is_refused_by_name():
    inner = moejax.moe(moejax.glu(D, 5), moejax.linear(D, 3), num_experts=3)
    layer = moejax.moe(inner, moejax.linear(D, E), num_experts=E, route=moejax.switch)
    with pytest.raises(ValueError, match="outputs_of"):
        layer.apply(params_of(layer), jnp.ones((T, D)))


def test_keys_that_cannot_be_ordered_are_compared():
    def rule(logits, *, table):
        return moejax.switch(logits)

    def layer(second):
        route = partial(rule, table={"a": 0, 1: second})
        return moejax.moe(moejax.linear(D, D), moejax.linear(D, E), num_experts=E, route=route)

    assert layer(2) == layer(2)
    assert layer(2) != layer(3)
