"""What a schedule is given: arrays of NumPy too, and parameters and tokens of the decision."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, params_of

D, E, T = 3, 8, 5
EXPERT, ROUTER = moejax.linear(D, 2), moejax.linear(D, E)
PARAMS, X = params_of(moejax.stack(EXPERT, E)), np.asarray(normal(1, T, D))
TOP_2 = partial(moejax.top_k, k=2)
PROBLEMS = {
    "dense": (moejax.dense, TOP_2),
    "dropless": (moejax.dropless, TOP_2),
    "capacity": (partial(moejax.capacity, factor=8.0), TOP_2),
    "gather_slots": (moejax.gather_slots, partial(moejax.expert_choice, capacity=2)),
    "mix_slots": (moejax.mix_slots, moejax.soft_slots),
}


@cache
def problem(name):
    """A schedule, and a decision of its kind."""
    schedule, rule = PROBLEMS[name]
    return schedule, rule(normal(2, T, E, 2) if name == "mix_slots" else normal(2, T, E))


@pytest.mark.parametrize("name", PROBLEMS)
def test_arrays_may_be_numpys(name):
    schedule, decision = problem(name)
    plain = jax.tree.map(np.asarray, (PARAMS, X, decision))
    y = schedule(EXPERT.apply, *plain)
    traced = jax.jit(partial(schedule, EXPERT.apply))(PARAMS, X, decision)
    np.testing.assert_allclose(y, traced, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("tokens", [T - 1, T + 1])
def test_tokens_that_were_not_routed_are_refused(name, tokens):
    schedule, decision = problem(name)
    with pytest.raises(ValueError, match=f"`x` must hold the {T} tokens.* got {tokens}"):
        schedule(EXPERT.apply, PARAMS, jnp.ones((tokens, D)), decision)


@pytest.mark.parametrize("name", PROBLEMS)
def test_parameters_of_fewer_experts_are_refused(name):
    """Without the check an index beyond them reads the last one."""
    schedule, decision = problem(name)
    fewer = jax.tree.map(lambda leaf: np.asarray(leaf)[: E // 2], PARAMS)
    with pytest.raises(ValueError, match=r"leading axis of `num_experts` \(8\), got bias \[4, 2\]"):
        schedule(EXPERT.apply, fewer, X, decision)


def test_the_layer_takes_numpy_without_jit():
    model = moejax.moe(EXPERT, ROUTER, num_experts=E, route=TOP_2)
    params = params_of(model)
    mask = np.arange(T) > 0
    y, _ = model.apply(jax.tree.map(np.asarray, params), X, mask=mask)
    np.testing.assert_allclose(y, jax.jit(model.apply)(params, X, mask=mask)[0], rtol=1e-6)
    assert not np.asarray(y)[0].any()
    assert jax.grad(lambda p: model.apply(p, X)[0].sum())(params)["experts"]["bias"].shape == (E, 2)


def test_the_grouped_product_takes_numpy():
    sizes = np.array([2, 0, 3, 0, 0, 0, 0, 0])
    y = moejax.grouped_matmul(X, np.asarray(PARAMS["kernel"]), sizes)
    expected = X[:2] @ np.asarray(PARAMS["kernel"])[0]
    np.testing.assert_allclose(np.asarray(y)[:2], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "dropless", "capacity"])
def test_an_expert_that_returns_more_than_its_output_is_refused(name):
    schedule, decision = problem(name)
    with pytest.raises(ValueError, match="must return one array, got a tuple"):
        schedule(lambda params, x: (EXPERT.apply(params, x), None), PARAMS, X, decision)


def test_a_mixture_of_means_needs_floats():
    schedule, decision = problem("mix_slots")
    with pytest.raises(ValueError, match="takes floats, of which it makes means, got int32"):
        schedule(EXPERT.apply, PARAMS, jnp.ones((T, D), jnp.int32), decision)


def test_integer_tokens_keep_the_outputs_of_several_kinds_of_experts():
    embed = moejax.Layer(
        lambda key: jax.random.normal(key, (10, 2)), lambda table, ids: table.at[ids].get()
    )
    router = moejax.Layer(
        lambda key: jax.random.normal(key, (10, 4)), lambda table, ids: table.at[ids].get()
    )
    of_kinds = moejax.moe_of(
        moejax.networks(embed, 4), router=router, route=moejax.softmax, feature_ndim=0
    )
    params = params_of(of_kinds)
    ids = np.arange(T, dtype=np.int32)
    y, _ = jax.jit(of_kinds.apply)(params, ids)
    plain = moejax.moe(embed, router, num_experts=4, feature_ndim=0)
    expected, _ = jax.jit(plain.apply)({**params, "experts": params["experts"][0]}, ids)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("decision", ["gather_slots", "mix_slots"])
def test_several_kinds_of_experts_take_choices_of_tokens(decision):
    model = moejax.moe_of(
        moejax.networks(EXPERT, E), router=ROUTER, route=lambda logits: problem(decision)[1]
    )
    with pytest.raises(ValueError, match="takes a decision of type Routing, got"):
        model.apply(params_of(model), X)


def test_what_a_rule_has_bound_is_kept():
    """Without a key or a mask of its own, the layer leaves the rule those it was made with."""
    key, mask = jax.random.key(5), np.zeros(T, bool)
    route = partial(moejax.noisy_top_k, noise_scale=3.0, k=2, key=key)
    model = moejax.moe(EXPERT, ROUTER, num_experts=E, route=route)
    params = params_of(model)
    _, routing = model.apply(params, X)
    np.testing.assert_array_equal(routing.experts, route(routing.logits).experts)
    _, other = model.apply(params, X, key=jax.random.key(6))
    assert not np.array_equal(routing.experts, other.experts)
    masked = partial(moejax.sinkhorn, mask=mask)
    model = moejax.moe(EXPERT, ROUTER, num_experts=E, route=masked)
    assert not np.any(model.apply(params, X)[1].present)


def test_a_rule_that_requires_a_key_is_given_none():
    def route(logits, key):
        assert key is None
        return moejax.softmax(logits)

    model = moejax.moe(EXPERT, ROUTER, num_experts=E, route=route)
    assert jax.eval_shape(model.apply, params_of(model), X)[0].shape == (T, 2)


@pytest.mark.parametrize(
    ("router", "route"),
    [
        (moejax.noisy(ROUTER, ROUTER), TOP_2),
        (ROUTER, partial(moejax.noisy_top_k, k=2)),
    ],
)
def test_a_router_and_a_rule_that_do_not_go_together_are_refused(router, route):
    model = moejax.moe(EXPERT, router, num_experts=E, route=route)
    with pytest.raises(ValueError, match=r"The rule must take what the router returns, \d arrays"):
        model.apply(params_of(model), X)
