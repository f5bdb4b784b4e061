"""Experts of several kinds, and a shared one, against the obvious loop."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import DTYPES, normal, params_of

D, T = 4, 9
NETWORK = moejax.glu(D, 5)
X = normal(0, T, D)
ROUTER = moejax.linear(D, 8)
EVERY_KIND = (
    moejax.constant_experts(2, D),  # 0, 1
    moejax.networks(NETWORK, 3),  # 2, 3, 4
    moejax.zero_experts(1),  # 5
    moejax.copy_experts(2),  # 6, 7
)
MODEL = moejax.moe_of(*EVERY_KIND, router=ROUTER, route=partial(moejax.top_k, k=3))
PARAMS = params_of(MODEL)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def one_expert(params, e, row):
    if e < 2:
        return params[0]["vectors"][e]
    if e < 5:
        return NETWORK.apply(jax.tree.map(lambda leaf: leaf[e - 2], params[1]), row[None])[0]
    return jnp.zeros(D) if e == 5 else row


def loop(params, x, k=3):
    """Runs one expert after the other on every token, and weighs its output by the choices."""
    routing = moejax.top_k(ROUTER.apply(params["router"], x), k=k)
    y = jnp.zeros_like(x)
    for e in range(8):
        weight = jnp.sum(jnp.where(routing.experts == e, routing.weights, 0), axis=1)
        y += weight[:, None] * jax.vmap(partial(one_expert, params["experts"], e))(x)
    return y


@partial(jax.jit, static_argnums=0)
def gradients_and_output(function, params, x):
    """The gradients of a scalar of the output, and the output."""
    weight = np.cos(np.arange(T * D, dtype=np.float32)).reshape(T, D)

    def scalar(params, x):
        y = function(params, x)
        return jnp.sum(weight * y.astype(jnp.float32)), y

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_is_computed_in_value_and_gradient(dtype):
    x = X.astype(DTYPES[dtype])
    gradients, y = gradients_and_output(moejax.outputs_of(MODEL).apply, PARAMS, x)
    assert y.dtype == DTYPES[dtype]
    close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
        a.astype(jnp.float32), b, rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype]
    )
    exact = x.astype(jnp.float32)
    chosen = moejax.top_k(ROUTER.apply(PARAMS["router"], exact), k=3).experts
    assert set(np.ravel(chosen)) == set(range(8))  # every kind is used
    expected = gradients_and_output(loop, PARAMS, exact)
    jax.tree.map(close, (gradients, y), expected)


def test_ids_run_through_the_banks_in_order():
    order = np.array([5, 6, 0, 2])  # zero, copy, constant, network
    logits = np.float32(1e3 * np.eye(8)[order])
    given = moejax.Layer(lambda key: {}, lambda params, x: logits)
    model = moejax.moe_of(*EVERY_KIND, router=given, route=moejax.switch)
    y, _ = jax.jit(model.apply)({"router": {}, "experts": PARAMS["experts"]}, X[:4])
    expected = jax.jit(lambda params, x: [one_expert(params, e, x[t]) for t, e in enumerate(order)])
    np.testing.assert_allclose(y, expected(PARAMS["experts"], X), rtol=1e-5, atol=1e-6)


@cache
def all_of_the_loop():
    return jax.jit(partial(loop, k=8))(PARAMS, X)


@pytest.mark.parametrize("route", [moejax.softmax, partial(moejax.top_k, k=8)])
def test_every_bank_takes_part_where_every_expert_is_chosen(route):
    y, _ = jax.jit(moejax.moe_of(*EVERY_KIND, router=ROUTER, route=route).apply)(PARAMS, X)
    np.testing.assert_allclose(y, all_of_the_loop(), rtol=1e-5, atol=1e-6)


def test_a_bank_is_given_the_choices_of_its_own_experts_alone():
    seen = []

    def watched(bank):
        def apply(params, x, routing):
            seen.append(routing)
            return bank.apply(params, x, routing)

        return bank._replace(apply=apply)

    @jax.jit
    def parts(params, x):
        model = moejax.moe_of(*map(watched, EVERY_KIND), router=ROUTER, route=moejax.softmax)
        _, routing = model.apply(params, x)
        return routing, seen

    routing, own = jax.device_get(parts(PARAMS, X))
    for part, start, bank in zip(own, (0, 2, 5, 6), EVERY_KIND, strict=True):
        gates = routing.gates[:, start : start + bank.num_experts]
        np.testing.assert_array_equal(part.gates, gates)
        assert not part.weights[part.experts == bank.num_experts].any()


def test_masked_tokens_get_zeros_from_every_kind():
    mask, apply = np.arange(T) % 3 != 0, jax.jit(MODEL.apply)
    padded = np.where(mask[:, None], X, np.float32(np.inf))
    [y, _], [expected, _] = jax.device_get((apply(PARAMS, padded, mask=mask), apply(PARAMS, X)))
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_allclose(y[mask], expected[mask], rtol=1e-5, atol=1e-6)


def dropping(expert, params, x, routing):
    """Room for half the choices: first choices come before second ones."""
    return moejax.capacity(expert, params, x, routing, factor=0.5)


@pytest.mark.parametrize(("k", "execute"), [(2, None), (2, dropping), (3, dropping)])
def test_a_mixture_of_one_bank_is_moe(k, execute):
    route = partial(moejax.top_k, k=k)
    banks = moejax.networks(NETWORK, 3, execute=execute)
    bank = moejax.moe_of(banks, router=moejax.linear(D, 3), route=route)
    plain = moejax.moe(NETWORK, moejax.linear(D, 3), num_experts=3, route=route, execute=execute)
    params = params_of(plain)
    y, _ = jax.jit(bank.apply)({**params, "experts": [params["experts"]]}, X)
    np.testing.assert_allclose(y, jax.jit(plain.apply)(params, X)[0], rtol=1e-6)


def test_the_shared_expert_always_runs():
    plain = moejax.moe(
        NETWORK, moejax.linear(D, 3), num_experts=3, route=partial(moejax.top_k, k=2)
    )
    shared = moejax.mlp(D, 7, D)  # with biases: not zero at a zeroed token
    model = moejax.with_shared(plain, shared)
    params = params_of(model)
    x, mask = np.reshape(X, (3, 3, D)), (np.arange(T) % 4 != 1).reshape(3, 3)
    apply = jax.jit(model.apply)
    y, routing = jax.device_get(apply(params, x))
    mixture, _ = jax.jit(plain.apply)(params["routed"], x)
    np.testing.assert_allclose(y, mixture + shared.apply(params["shared"], x), rtol=1e-5, atol=1e-6)
    assert routing.experts.shape == (T, 2)
    padded = np.where(mask[..., None], x, np.float32(np.nan))
    masked, _ = jax.device_get(apply(params, padded, mask=mask))
    np.testing.assert_array_equal(masked[~mask], 0)
    np.testing.assert_allclose(masked[mask], y[mask], rtol=1e-5, atol=1e-6)


def test_a_mixture_needs_a_bank():
    with pytest.raises(ValueError, match="at least one bank"):
        moejax.moe_of(router=moejax.linear(D, 1), route=moejax.switch)


BANKS = {
    "networks": partial(moejax.networks, moejax.linear(D, D)),
    "zero_experts": moejax.zero_experts,
    "copy_experts": moejax.copy_experts,
    "constant_experts": partial(moejax.constant_experts, width=D),
}


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("number", [-1, 0, 1.5, None])
def test_a_bank_has_a_positive_number_of_experts(kind, number):
    with pytest.raises(ValueError, match=f"`num_experts` must be an integer, .* got {number}"):
        BANKS[kind](num_experts=number)


@pytest.mark.parametrize("width", [0, 1.5])
def test_constants_have_a_positive_width(width):
    with pytest.raises(ValueError, match=r"`constant_experts` must be positive integers"):
        moejax.constant_experts(2, width)


@pytest.mark.parametrize("constant_width", [1, 3])
def test_banks_must_agree_on_the_output(constant_width):
    banks = moejax.networks(moejax.glu(4, 8), 3), moejax.constant_experts(1, constant_width)
    model = moejax.moe_of(*banks, router=moejax.linear(4, 4), route=moejax.softmax)
    with pytest.raises(ValueError, match="outputs of one shape"):
        jax.eval_shape(model.apply, params_of(model), jnp.ones((2, 4)))


def test_zero_experts_alone_have_no_shape():
    model = moejax.moe_of(moejax.zero_experts(4), router=moejax.linear(4, 4), route=moejax.softmax)
    with pytest.raises(ValueError, match="outputs of one shape"):
        jax.eval_shape(model.apply, params_of(model), jnp.ones((2, 4)))


def test_the_shared_expert_must_be_as_wide_as_the_mixture():
    routed = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 3), num_experts=3)
    model = moejax.with_shared(routed, moejax.linear(4, 1))
    with pytest.raises(ValueError, match="the mixture's output"):
        jax.eval_shape(model.apply, params_of(model), jnp.ones((2, 4)))


def test_integer_tokens_are_summed_in_the_dtype_of_the_networks(x64):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    embed = moejax.Layer(lambda key: table, lambda params, x: params[x[:, 0]])
    router = moejax.Layer(lambda key: {}, lambda params, x: jnp.eye(3, dtype=jnp.float32)[x[:, 0]])
    model = moejax.moe_of(
        moejax.networks(embed, 2),
        moejax.zero_experts(1),
        router=router,
        route=partial(moejax.top_k, k=2),
    )
    y, _ = jax.eval_shape(model.apply, params_of(model), np.arange(3)[:, None])
    assert y.dtype == jnp.float32


def test_copies_keep_double_precision(x64):
    x = normal(0, 3, 4, dtype=float)
    routing = moejax.top_k(jnp.zeros((3, 2), jnp.float32), k=1, renormalize=False)
    y = moejax.copy_experts(2).apply({}, x, routing)
    assert y.dtype == jnp.float64
    np.testing.assert_array_equal(y, np.asarray(x) / 2)


def test_a_constant_that_nobody_chose_is_not_read():
    model = moejax.moe_of(
        moejax.constant_experts(3, D), router=moejax.linear(D, 3), route=partial(moejax.top_k, k=3)
    )
    params = params_of(model)
    vectors = np.ones((3, D), np.float32)
    vectors[1] = np.inf
    params["experts"][0]["vectors"] = vectors
    params["router"]["bias"] = np.float32([0, -np.inf, 0])
    value, gradient = jax.jit(jax.value_and_grad(lambda p: model.apply(p, X)[0].sum()))(params)
    np.testing.assert_allclose(value, X.shape[0] * D, rtol=1e-6)
    assert np.isfinite(gradient["experts"][0]["vectors"]).all()


def test_the_parameters_are_of_every_bank():
    kinds = moejax.copy_experts(1), moejax.constant_experts(1, D)
    build = partial(moejax.moe_of, router=moejax.linear(D, 2), route=moejax.softmax)
    params = params_of(build(*kinds))
    with pytest.raises(ValueError, match="must be those of 2 banks, got 1"):
        jax.eval_shape(build(*kinds).apply, params | {"experts": params["experts"][:1]}, X)
    other = params_of(moejax.constant_experts(2, D))
    with pytest.raises(ValueError, match="leading axis of `num_experts`"):
        jax.eval_shape(build(*kinds).apply, params | {"experts": [{}, other]}, X)
