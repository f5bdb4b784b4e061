"""Mistakes that mixtures of experts are known for, each with the test that it is not made here."""

import importlib
import pkgutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import SCHEDULES, normal, params_of

D, E, T = 3, 4, 8
X, LOGITS = normal(0, T, D, scale=3), normal(1, T, E)
IDENTITY = moejax.Layer(lambda key: {"unused": jnp.zeros(())}, lambda params, x: x)


def test_one_renormalised_choice_would_send_no_gradient_to_the_router():
    with pytest.raises(ValueError, match="zero gradient"):
        moejax.top_k(LOGITS, k=1)
    gradient = jax.jit(jax.grad(lambda logits: moejax.switch(logits).weights.sum()))(LOGITS)
    assert np.asarray(gradient).any(axis=-1).all()


def test_a_group_that_is_out_stays_out_when_scores_are_negative():
    bias = jnp.full(E, -5.0)  # every s + b is below zero
    logits = jnp.array([[3.0, 2.0, -1.0, -2.0]])
    routing = moejax.sigmoid_top_k(logits, bias, k=2, num_groups=2, kept_groups=1)
    np.testing.assert_array_equal(np.sort(routing.experts), [[0, 1]])


def test_four_layers_each_collapsed_on_another_expert_are_four_losses():
    every = [np.tile(row, (T, 1)) for row in np.float32(100 * np.eye(E) - 50)]
    layers = [moejax.switch(jax.device_put(logits)) for logits in every]
    for routing in layers:
        np.testing.assert_allclose(moejax.load_balancing_loss(routing), E, rtol=1e-6)
    pooled = jax.tree.map(lambda *leaves: np.concatenate(leaves), *layers)
    np.testing.assert_allclose(moejax.load_balancing_loss(pooled), 1, rtol=1e-6)  # the trap


def test_balance_is_measured_before_dropping():
    collapsed = moejax.Layer(
        lambda key: {}, lambda params, x: jnp.full((len(x), E), -50.0).at[:, 0].set(50.0)
    )

    def execute(expert, params, x, routing):
        routing = moejax.limit_capacity(routing, capacity=T // E)
        return moejax.dropless(expert, params, x, routing)

    layer = moejax.moe(IDENTITY, collapsed, num_experts=E, route=moejax.switch, execute=execute)
    y, routing = jax.jit(layer.apply)(params_of(layer), X)
    assert np.asarray(y).any(axis=-1).sum() == T // E
    np.testing.assert_allclose(moejax.load_balancing_loss(routing), E, rtol=1e-6)
    np.testing.assert_allclose(moejax.expert_load(routing), [1, 0, 0, 0])


RANDOM = {
    "noisy_top_2": (
        moejax.noisy(moejax.linear(D, E), moejax.linear(D, E)),
        partial(moejax.noisy_top_k, k=2),
    ),
    "gshard_top_2": (moejax.linear(D, E), moejax.gshard_top_2),
    "jitter": (moejax.jittered(moejax.linear(D, E), epsilon=0.5), moejax.softmax),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_nothing_is_random_at_evaluation(kind):
    router, route = RANDOM[kind]
    options = {"route": route, "execute": moejax.dense}
    layer = moejax.moe(moejax.linear(D, 2), router, num_experts=E, **options)
    params = params_of(layer)
    apply = jax.jit(layer.apply)
    y, first = apply(params, X)
    again, second = apply(params, X)
    np.testing.assert_array_equal(y, again)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    noisy = [apply(params, X, key=jax.random.key(seed))[0] for seed in range(8)]
    assert not all(np.array_equal(other, y) for other in noisy)


def test_experts_never_see_the_jitter():
    router = moejax.jittered(moejax.linear(D, E), epsilon=0.9)
    layer = moejax.moe(IDENTITY, router, num_experts=E)
    y, _ = layer.apply(params_of(layer), X, key=jax.random.key(1))
    np.testing.assert_allclose(y, X, rtol=1e-6)  # gates sum to one, experts return what they get


def test_nothing_is_kept_between_calls():
    routing = moejax.top_k(LOGITS, k=2)
    first = [loss(routing) for loss in (moejax.load_balancing_loss, moejax.importance_loss)]
    second = [loss(routing) for loss in (moejax.load_balancing_loss, moejax.importance_loss)]
    assert first == second
    names = [module.name for module in pkgutil.walk_packages(moejax.__path__, prefix="moejax.")]
    assert {"moejax.schedules.capacity", "moejax.rules.softmax"} <= {*names}
    for module in [moejax, *map(importlib.import_module, names)]:
        kept = {
            name
            for name, value in vars(module).items()
            if isinstance(value, list | dict | set) and not name.startswith("__")
        }
        assert not kept, f"{module.__name__} keeps {kept}"


def test_positions_are_counted_in_integers():
    scores = np.zeros((3000, E), jnp.bfloat16)  # bfloat16 counts to 256
    routing = moejax.Routing(np.zeros((3000, 1), np.int32), scores[:, :1], scores, scores)
    places = jax.jit(moejax.positions)(routing)
    np.testing.assert_array_equal(places, np.arange(3000)[:, None])
    equations = jax.make_jaxpr(moejax.positions)(routing).eqns
    used = [value.aval.dtype for equation in equations for value in equation.outvars]
    assert not [dtype for dtype in used if jnp.issubdtype(dtype, jnp.floating)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_choices_means_nothing(schedule):
    expert = moejax.linear(D, 2)
    params = params_of(moejax.stack(expert, E))
    routing = moejax.top_k(LOGITS, k=3)
    experts, weights = (np.asarray(leaf)[:, ::-1] for leaf in routing[:2])
    turned = routing._replace(experts=experts, weights=weights)
    y, other = (SCHEDULES[schedule](expert.apply, params, X, r) for r in (routing, turned))
    np.testing.assert_allclose(other, y, rtol=1e-5, atol=1e-6)
    for loss in (moejax.load_balancing_loss, moejax.importance_loss):
        np.testing.assert_allclose(loss(turned), loss(routing), rtol=1e-6)


WEIGHTED = {
    **{name: (schedule, partial(moejax.top_k, k=2)) for name, schedule in SCHEDULES.items()},
    "gather_slots": (moejax.gather_slots, partial(moejax.expert_choice, capacity=T)),
    "mix_slots": (moejax.mix_slots, lambda logits: moejax.soft_slots(logits[..., None])),
}


@pytest.mark.parametrize("schedule", WEIGHTED)
def test_weights_are_not_rounded_before_the_sum(schedule):
    """Two experts that nearly cancel: with weights rounded to bfloat16 nothing would be left."""
    execute, route = WEIGHTED[schedule]
    expert = lambda params, x: params * jnp.ones_like(x)  # noqa: E731
    params = jax.device_put(np.array([256, -256], jnp.bfloat16))
    x = np.ones((T, 1), jnp.bfloat16)
    run = jax.jit(lambda params, x, logits: execute(expert, params, x, route(logits)))
    y = run(params, x, np.log(np.float32([[0.501, 0.499]] * T)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), 0.512, rtol=2**-8)
