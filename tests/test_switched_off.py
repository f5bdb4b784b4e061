"""Every rule, every loss and every diagnostic where logits of -inf switch experts off."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import RULES, E, T, normal

LOSSES = {
    "load_balancing": moejax.load_balancing_loss,
    "importance": moejax.importance_loss,
    "z": moejax.router_z_loss,
    "entropy": moejax.entropy_loss,
    "mutual_information": moejax.mutual_information_loss,
    "l1": moejax.l1_loss,
    "load": moejax.load_loss,
    "nll": lambda routing: moejax.mixture_nll(
        jax.nn.log_softmax(routing.logits), jnp.ones_like(routing.logits)
    ),
    "weights": lambda routing: jnp.sum(routing.weights**2),
    "confidence": moejax.confidence,
    "gate_entropy": moejax.gate_entropy,
    "effective_experts": moejax.effective_experts,
    "load_of_experts": lambda routing: jnp.sum(moejax.expert_load(routing) ** 2),
}
OFF = {
    "one": [False, True, False, False],
    "all but one": [True, True, False, True],
    "a group": [True, True, False, False],
    "none": [False] * E,
}
LOGITS = normal(0, T, E)
COLUMNS = np.array(list(OFF.values()))[:, None]  # [cases, 1, E]
ROWS = np.stack([np.roll(COLUMNS[1, 0], t) for t in range(T)])[None]  # others for each token
SWITCHED_OFF = np.concatenate([np.broadcast_to(COLUMNS, (len(OFF), T, E)), ROWS])
CASES = jax.device_put(np.where(SWITCHED_OFF, np.float32(-np.inf), LOGITS))  # [cases, T, E]


def assert_finite(values, what):
    assert np.isfinite(values).all(), f"{what}: {values}"


def losses_of(routing):
    known = {name: loss for name, loss in LOSSES.items() if name != "load"}
    return LOSSES if routing.chances is not None else known


@jax.jit  # compiled once for every shape and kind of a decision
@jax.vmap
@partial(jax.value_and_grad, has_aux=True, allow_int=True)
def total_of_losses(routing):
    values = {name: loss(routing) for name, loss in losses_of(routing).items()}
    return sum(values.values()), values  # finite if each of them is, and so is its gradient


@cache
def decided(rule):
    """Its decisions in every case, and what takes their gradients to the logits."""
    return jax.vjp(jax.jit(jax.vmap(RULES[rule])), CASES)


@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients_are_finite(rule):
    routings, to_logits = decided(rule)
    (_, values), of_routings = total_of_losses(routings)
    [gradients] = to_logits(of_routings)
    for case, number in zip([*OFF, "each token its own"], range(len(CASES)), strict=True):
        for name, value in values.items():
            assert_finite(value[number], f"{name} with {case} off")
        assert_finite(gradients[number], f"gradient of a loss with {case} off")


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"hashed"}))
def test_an_expert_that_is_off_has_no_weight_and_no_score(rule):
    routing, _ = decided(rule)
    off = np.isneginf(CASES)
    gates = jax.vmap(lambda routing: routing.gates)(routing)
    np.testing.assert_array_equal(np.where(off, gates, 0), 0)
    np.testing.assert_array_equal(np.where(off, routing.scores, 0), 0)
    if routing.chances is not None:
        np.testing.assert_array_equal(np.where(off, routing.chances, 0), 0)


def test_the_chances_of_fewer_experts_than_k():
    chances = moejax.noisy_top_k(jnp.array([[1.0, -jnp.inf, -jnp.inf]]), 0.5, k=2).chances
    np.testing.assert_array_equal(chances, [[1, 0, 0]])


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def losses_of_noisy(logits, scale, key):
    routing = moejax.noisy_top_k(logits, scale, k=2, key=key)
    return moejax.load_loss(routing) + moejax.importance_loss(routing)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0])
@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_noise_may_vanish(scale, key):
    value, gradients = losses_of_noisy(LOGITS, np.full((T, E), scale, np.float32), key)
    for values in (value, *gradients):
        assert_finite(values, f"noise {scale}")


def test_a_bias_does_not_bring_back_an_expert():
    logits = np.asarray(CASES)[0]  # expert 1 is off
    bias = jnp.array([0.0, 9.0, 0.0, 0.0])
    biased = partial(moejax.sigmoid_top_k, logits, bias)
    for routing in (biased(k=2), biased(k=1, num_groups=2, renormalize=False)):
        assert 1 not in np.asarray(routing.experts)


def test_a_group_of_one_that_is_left_is_better_than_one_of_none():
    logits = jnp.array([[-jnp.inf, -jnp.inf, -jnp.inf, 1.0]])
    routing = moejax.sigmoid_top_k(logits, k=2, num_groups=2)
    np.testing.assert_array_equal(routing.gates, [[0, 0, 0, 1]])


def test_slots_of_an_expert_that_is_off_are_empty():
    logits = np.asarray(CASES)[0]  # expert 1 is off

    def sums(logits):
        soft = moejax.soft_slots(jnp.stack([logits, 2 * logits], axis=-1))
        taken = moejax.expert_choice(logits, capacity=2)
        sums = (soft.dispatch**2).sum(), (soft.combine**2).sum(), taken.weights.sum()
        return jnp.stack(sums), (sums, soft, taken)

    gradients, parts = jax.jit(jax.jacrev(sums, has_aux=True))(logits)
    values, soft, taken = jax.device_get(parts)
    assert_finite(values, "slots")
    assert_finite(gradients, "gradients of slots")
    np.testing.assert_array_equal(taken.tokens[1], T)
    np.testing.assert_array_equal(taken.weights[1], 0)
    np.testing.assert_array_equal(soft.dispatch[:, 1], 0)
    np.testing.assert_array_equal(soft.combine[:, 1], 0)


@pytest.mark.parametrize("loss", [moejax.router_z_loss, moejax.entropy_loss])
def test_losses_of_experts_that_choose(loss):
    value = jax.value_and_grad(lambda x: loss(partial(moejax.expert_choice, capacity=2)(x)))
    for one in jax.jit(value)(np.asarray(CASES)[0]):
        assert_finite(one, "expert choice")


OFF_BUT_ONE = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf, -jnp.inf, 1.0]])
CHOOSE_TWO = {
    "top_k": partial(moejax.top_k, k=2),
    "raw": partial(moejax.top_k, k=2, renormalize=False),
    "sigmoid": partial(moejax.sigmoid_top_k, k=2),
    "biased": partial(moejax.sigmoid_top_k, bias=jnp.array([0.0, 9.0, 0.0]), k=2),
    "by_score": partial(moejax.by_score, k=2),
    "noisy": partial(moejax.noisy_top_k, noise_scale=0.1, k=2, key=jax.random.key(0)),
    "gshard": moejax.gshard_top_2,
    "sinkhorn": partial(moejax.sinkhorn, k=2),
    "top_p": partial(moejax.top_p, p=1.0),
}


# As one program; eagerly every operation is one.
limit_to_one = jax.jit(partial(moejax.limit_capacity, capacity=1))


@pytest.mark.parametrize("rule", CHOOSE_TWO)
def test_a_choice_of_an_expert_that_is_off_goes_nowhere(rule):
    routing = CHOOSE_TWO[rule](OFF_BUT_ONE)
    np.testing.assert_array_equal(routing.counts, [1, 0, 1])
    assert np.asarray(routing.experts)[:, 0].tolist() == [0, 2]
    assert int(moejax.dead_experts(routing)) == 1
    limited = limit_to_one(routing)
    np.testing.assert_array_equal(limited.gates, routing.gates)


def test_experts_of_a_group_that_is_out_are_not_chosen_for_those_that_are_off():
    logits = jnp.array([[-3.0, -3.0, 5.0, -jnp.inf]])
    routing = moejax.sigmoid_top_k(logits, k=2, num_groups=2, kept_groups=1)
    assert routing.experts.tolist() == [[2, 4]]
    assert routing.weights.tolist() == [[1, 0]]


def test_rounding_brings_no_expert_back():
    logits = np.where(np.arange(16) < 8, normal(0, 500, 16), np.float32(-np.inf))
    routing = moejax.top_p(jax.device_put(logits), p=1.0)
    np.testing.assert_array_equal(np.asarray(routing.counts)[8:], 0)


def test_a_token_without_any_expert_is_not_a_number():
    weights = moejax.top_k(np.full((1, 3), -np.inf, np.float32), k=2).weights
    assert np.isnan(np.asarray(weights)[0, 0])


def test_a_bound_on_logits_leaves_an_expert_off():
    router = moejax.Layer(lambda key: {}, lambda params, x: x)
    capped = moejax.soft_capped(router, cap=2.0).apply({}, jnp.array([[0.0, 1.0, -jnp.inf]]))
    np.testing.assert_allclose(capped, [[0, 2 * np.tanh(0.5), -np.inf]], rtol=1e-6)
    with pytest.raises(ValueError, match="`cap` must be positive and finite, got inf"):
        moejax.soft_capped(router, cap=float("inf"))


def test_slots_of_an_expert_that_is_off_are_not_computed_on_zeros():
    def unit(params, x):
        y = x @ params
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    logits = np.zeros((4, 2, 1), np.float32)
    logits[:, 1] = -np.inf
    decision = moejax.soft_slots(logits)

    def loss(params, x):
        return jnp.sum(moejax.mix_slots(unit, params, x, decision) ** 2)

    params, x = np.stack([np.eye(3, dtype=np.float32)] * 2), normal(0, 4, 3)
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    assert np.isfinite(value)
    for gradient in gradients:
        assert_finite(gradient, "gradient")
    np.testing.assert_array_equal(np.asarray(gradients[0])[1], 0)


def test_a_router_that_has_diverged_shows_under_sparsemixer(key):
    logits = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 3.0, 1.0]])
    for drawn in (None, key):
        routing = moejax.sparsemixer(logits, epsilon=0.01, key=drawn)
        weights = np.asarray(routing.weights)
        assert np.isnan(weights[0]).any()
        assert routing.present.all()
        assert np.isfinite(weights[1]).all()
    nothing = moejax.sparsemixer(np.full((1, 3), -np.inf, np.float32), epsilon=0.01)
    assert np.isnan(np.asarray(nothing.weights)[0, 0])  # as of `top_k`
    assert np.asarray(nothing.experts)[0, 1] == 3


def test_a_token_without_experts_is_taken_by_none():
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_decision(logits):
        decision = moejax.expert_choice(logits, capacity=2)
        return decision.weights.sum(), decision

    logits = jnp.array([[1.0, 0.0], [-jnp.inf, -jnp.inf], [0.0, 2.0]])
    gradient, decision = gradient_and_decision(logits)
    assert sorted(decision.tokens.ravel().tolist()) == [0, 0, 2, 2]
    assert decision.present.tolist() == [True, False, True]
    assert np.isfinite(gradient).all()
