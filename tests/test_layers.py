"""Layers: shapes, how they start, dtypes, and stacking."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax
from cases import normal, params_of, unit


def test_linear_is_an_affine_map(key):
    layer = moejax.linear(3, 2)
    params = params_of(layer)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-6)
    assert set(jax.eval_shape(moejax.linear(3, 2, bias=False).init, key)) == {"kernel"}


def test_start_is_uniform_within_one_over_root_fan_in(key):
    params = jax.device_get(jax.jit(moejax.linear(400, 300).init)(key))
    for leaf in (params["kernel"], params["bias"]):
        assert np.abs(leaf).max() <= np.float32(1 / 20)
        assert np.abs(leaf).max() > 0.9 / 20
        np.testing.assert_allclose(leaf.std(), 1 / 20 / np.sqrt(3), rtol=0.1)


SQUARE = moejax.linear(4, 4)
BANKS = [moejax.networks(SQUARE, 4)] * 2
SEVERAL_PARTS = {
    "glu": moejax.glu(4, 4),
    "mlp": moejax.mlp(4, 4, 4),
    "gated": moejax.gated(SQUARE, SQUARE),
    "between": moejax.between(SQUARE, SQUARE, SQUARE),
    "with_shared": moejax.with_shared(SQUARE, SQUARE),
    "noisy": moejax.noisy(SQUARE, SQUARE),
    "moe": moejax.moe(SQUARE, moejax.stack(SQUARE, 4), num_experts=4),
    "moe_of": moejax.moe_of(*BANKS, router=moejax.linear(4, 8), route=moejax.softmax),
}


@pytest.mark.parametrize("layer", SEVERAL_PARTS.values(), ids=SEVERAL_PARTS)
def test_no_two_parameters_start_alike(layer, key):
    leaves = jax.tree.leaves(layer.init(key))
    rows = np.concatenate([np.asarray(leaf).reshape(-1, 4) for leaf in leaves])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_another_initializer_is_one_argument(key):
    zeros = jax.nn.initializers.zeros
    layer = partial(moejax.linear, kernel_init=zeros, bias_init=zeros)
    assert not layer(3, 2).init(key)["kernel"].any()
    params = moejax.mlp(3, 4, 2, layer=layer).init(key)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params))


def test_mlp_has_no_activation_after_the_last_layer():
    layer = moejax.mlp(3, 5, 2)
    params, x = jax.device_get((params_of(layer), normal(0, 64, 3)))
    first, second = params["layers"]
    hidden = np.maximum(x @ first["kernel"] + first["bias"][None], 0)
    expected = hidden @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-6)
    assert (expected < 0).any()


def test_glu():
    layer = moejax.glu(3, 5)
    params = params_of(layer)
    assert jax.tree.map(jnp.shape, params) == {
        "gate": {"kernel": (3, 5)},
        "up": {"kernel": (3, 5)},
        "down": {"kernel": (5, 3)},
    }
    x = np.asarray(normal(0, 4, 3))
    gate, up, down = (np.asarray(params[name]["kernel"]) for name in ("gate", "up", "down"))
    expected = (np.asarray(jax.nn.silu(x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [moejax.linear(3, 2), moejax.mlp(3, 4, 2), moejax.glu(3, 4)])
def test_computes_in_the_dtype_of_x(layer):
    params = params_of(layer)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        x = jax.ShapeDtypeStruct((2, 3), dtype)
        assert jax.eval_shape(layer.apply, params, x).dtype == dtype


def test_widths_may_be_integers_of_numpy(key):
    params = jax.eval_shape(moejax.linear(np.prod((2, 3)), 4).init, key)
    assert params["kernel"].shape == (6, 4)


def test_stack_is_every_copy_by_itself(key):
    layer = moejax.mlp(3, 4, 2)
    params, x = jax.device_get((jax.jit(moejax.stack(layer, 5).init)(key), normal(0, 7, 3)))
    outputs = moejax.stack(layer, 5).apply(params, x)
    assert outputs.shape == (5, 7, 2)
    for e, output in enumerate(np.asarray(outputs)):
        own = jax.tree.map(lambda leaf, e=e: leaf[e], params)
        np.testing.assert_allclose(output, layer.apply(own, x), rtol=1e-5, atol=1e-6)
    kernels = params["layers"][0]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moejax.linear(0, 2), "positive integers, got \\(0, 2\\)"),
        (lambda: moejax.linear(2, 1.5), "positive integers"),
        (lambda: moejax.mlp(3), "at least an input and an output"),
        (lambda: moejax.glu(3, -1), "positive integers"),
        (lambda: moejax.stack(moejax.linear(1, 1), 0), "at least 1, got 0"),
        (lambda: moejax.stack(moejax.linear(1, 1), 2.0), "`num_experts` must be an integer"),
    ],
)
def test_bad_widths(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((5, 2)), "inputs of width 3, got \\[5, 2\\]"),
        (jnp.ones((5, 3), jnp.uint8), "floats, got uint8: cast"),  # would round the kernel
    ],
)
@pytest.mark.parametrize("layer", [moejax.linear(3, 2), moejax.glu(3, 4), moejax.mlp(3, 4, 2)])
def test_bad_inputs(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer.apply(params_of(layer), x)


def test_glu_combines_its_halves_as_it_is_told():
    clamped = lambda gate, up: (jnp.clip(up, -1, 1) + 1) * jnp.minimum(gate, 1)  # noqa: E731
    layer = moejax.glu(3, 5, combine=clamped)
    params, x = params_of(layer), np.asarray(normal(0, 4, 3, scale=3))
    gate, up, down = (np.asarray(params[name]["kernel"]) for name in ("gate", "up", "down"))
    expected = ((np.clip(x @ up, -1, 1) + 1) * np.minimum(x @ gate, 1)) @ down
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-6)


def test_gated():
    layer, gate = moejax.glu(3, 5), moejax.linear(3, 1)
    both = moejax.gated(layer, gate)
    params, x = params_of(both), normal(0, 4, 3)
    opened = jax.nn.sigmoid(gate.apply(params["gate"], x))
    expected = opened * layer.apply(params["layer"], x)
    np.testing.assert_allclose(both.apply(params, x), expected, rtol=1e-6)
    wide = moejax.gated(layer, moejax.linear(3, 2))
    with pytest.raises(ValueError, match="one number per token"):
        wide.apply(params_of(wide), x)


def test_between():
    narrow = moejax.moe(moejax.glu(2, 4), moejax.linear(2, 3), num_experts=3)
    layer = moejax.between(moejax.linear(5, 2), narrow, moejax.linear(2, 5))
    params, x = params_of(layer), normal(0, 2, 4, 5)
    y, routing = jax.jit(layer.apply)(params, x, mask=np.ones((2, 4), bool))
    inner, _ = narrow.apply(params["model"], moejax.linear(5, 2).apply(params["before"], x))
    np.testing.assert_allclose(
        y, moejax.linear(2, 5).apply(params["after"], inner), rtol=1e-5, atol=1e-6
    )
    assert routing.experts.shape == (8, 3)


def test_between_reads_no_padding():
    narrow = moejax.moe(moejax.glu(2, 4), moejax.linear(2, 3), num_experts=3)
    layer = moejax.between(moejax.linear(5, 2), narrow, moejax.linear(2, 5))
    mask = np.array([[True, True, False], [False, True, False]])
    x = np.where(mask[..., None], normal(0, 2, 3, 5), np.float32(np.nan))
    params = params_of(layer)
    params["after"]["bias"] = np.float32([1, 2, 3, 4, 5])

    def loss(params):
        y, _ = layer.apply(params, x, mask=mask)
        return y.sum(), y

    gradient, y = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_allclose(y[mask], jax.jit(layer.apply)(params, x[mask])[0], rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("make", [partial(moejax.mlp, 3, 4, 2), partial(moejax.glu, 3, 4)])
def test_parameters_may_start_in_another_dtype(make, key):
    layer = make(layer=partial(moejax.linear, param_dtype=jnp.bfloat16))
    params = jax.jit(layer.init)(key)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert layer.apply(params, np.ones((2, 3), np.float32)).dtype == jnp.float32


def test_between_gives_no_padding_to_the_layer_after():
    mixture = moejax.moe(moejax.linear(2, 2), moejax.linear(2, 3), num_experts=3)
    model = moejax.between(moejax.linear(4, 2), mixture, unit(2, 2))
    params, x = params_of(model), normal(0, 5, 4)
    mask = jax.device_put(np.arange(5) != 2)

    def loss(params):
        y, _ = model.apply(params, x, mask=mask)
        return jnp.sum(y**2), y

    gradients, y = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not y[2].any()


def test_between_passes_a_key_to_what_takes_one(key):
    noisy = moejax.moe(
        moejax.linear(2, 2),
        moejax.noisy(moejax.linear(2, 4), moejax.linear(2, 4)),
        num_experts=4,
        route=partial(moejax.noisy_top_k, k=2),
    )
    x = normal(0, 64, 4)
    model = moejax.between(moejax.linear(4, 2), noisy, moejax.linear(2, 4))
    params = params_of(model)
    apply = jax.jit(model.apply)
    assert not np.array_equal(apply(params, x)[0], apply(params, x, key=key)[0])
    router = moejax.between(moejax.linear(4, 2), moejax.linear(2, 3), moejax.linear(3, 3))
    layer = moejax.moe(moejax.linear(4, 4), router, num_experts=3)  # gives the router its key
    jax.eval_shape(layer.apply, params_of(layer), x, key=key)


@pytest.mark.parametrize(
    "make",
    [
        lambda: moejax.between(moejax.linear(2, 2), jnp.tanh, moejax.linear(2, 2)),
        lambda: moejax.gated(moejax.linear(2, 2), jnp.tanh),
        lambda: moejax.networks(jnp.tanh, 4),
        lambda: moejax.with_shared(moejax.linear(2, 2), jnp.tanh),
        lambda: moejax.outputs_of(jnp.tanh),
        lambda: moejax.stack(jnp.tanh, 4),
        lambda: moejax.noisy(moejax.linear(2, 2), jnp.tanh),
        lambda: moejax.biased(jnp.tanh, 4),
        lambda: moejax.jittered(jnp.tanh, epsilon=0.1),
        lambda: moejax.tempered(jnp.tanh, temperature=2.0),
        lambda: moejax.soft_capped(jnp.tanh, cap=3.0),
    ],
)
def test_what_is_no_layer_is_refused_where_it_is_given(make):
    with pytest.raises(ValueError, match="must be a Layer, a pair of functions"):
        make()


def test_an_optimizer_is_no_layer():
    with pytest.raises(ValueError, match="`expert` must be a Layer"):
        moejax.moe(optax.sgd(0.1), moejax.linear(2, 2), num_experts=2)


@pytest.mark.parametrize(
    "wrap", [partial(moejax.tempered, temperature=0.5), partial(moejax.soft_capped, cap=3.0)]
)
def test_logits_that_are_integers_are_refused(wrap):
    router = wrap(moejax.Layer(lambda key: {}, lambda params, x: x.astype(jnp.int32)))
    with pytest.raises(ValueError, match="logits that are floats, got int32"):
        router.apply({}, jnp.ones((2, 3)))


def test_a_stack_refuses_parameters_of_another_number_of_experts():
    params = params_of(moejax.stack(moejax.linear(2, 2), 3))
    with pytest.raises(ValueError, match=r"leading axis of `num_experts` \(4\)"):
        moejax.stack(moejax.linear(2, 2), 4).apply(params, jnp.ones((5, 2)))


def test_a_stack_may_have_no_parameters():
    halves = moejax.stack(moejax.Layer(lambda key: {}, lambda params, x: x / 2), 3)
    np.testing.assert_array_equal(halves.apply({}, jnp.ones((5, 2))), np.full((3, 5, 2), 0.5))
