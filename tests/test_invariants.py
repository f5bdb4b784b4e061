"""What must hold of every rule for any logits: a rule in the table is tested here."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moejax
from cases import EXPERTS, RULES, SCHEDULES, D, E, T, normal, params_of
from reference import check_gradients

# Noise is drawn, and ids are given, by position.
BY_POSITION = {"noisy_top_2", "gshard_top_2", "hashed", "sparsemixer_drawn"}
# The bias and the groups belong to numbered experts.
BY_EXPERT = {"sigmoid_top_2", "sigmoid_groups", "by_score_groups"}
# A weight of its own for each expert.
RAW = {"relu", "sigmoid_groups", "sparsemixer", "sparsemixer_drawn"}
# The gradient is an estimate, and not that of the value.
ESTIMATED = {"sparsemixer_drawn"}
SUMS = {
    "softmax": 1,
    "top_2": 1,
    "top_all": 1,
    "noisy_top_2": 1,
    "sigmoid_top_2": 2.5,
    "by_score": 2.5,
}
BY_SCORES = {"sigmoid_top_2", "by_score"}  # where logits far apart are rounded to the same score
OVER_ALL_TOKENS = {"sinkhorn", "sinkhorn_2"}

seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([0.0, 1e-3, 1.0, 40.0])
few = settings(max_examples=15, deadline=None, derandomize=True)


def some_logits(seed, scale):
    return np.asarray(normal(seed, T, E, scale=scale))


@cache
def decide(rule):
    """The decision with its gates by expert; compiled once per rule, with a mask."""

    @jax.jit
    def decision(logits, mask):
        route = RULES[rule]
        routing = route(logits, mask=mask) if rule in OVER_ALL_TOKENS else route(logits)
        routing = moejax.mask_tokens(routing, mask)
        return routing, routing.gates

    return lambda logits, mask: jax.device_get(decision(logits, mask))


EVERY = np.ones(T, bool)


@jax.jit
def losses(routing):
    every = moejax.load_balancing_loss, moejax.importance_loss, moejax.router_z_loss
    return jnp.stack([loss(routing) for loss in every])


@pytest.mark.parametrize("rule", RULES)
@few
@given(seed=seeds, scale=scales)
def test_a_decision_is_well_formed(rule, seed, scale):
    routing, gates = decide(rule)(some_logits(seed, scale), EVERY)
    experts = routing.experts
    assert experts.dtype == np.int32
    assert routing.weights.dtype == routing.scores.dtype == jnp.float32
    assert experts.min() >= 0
    assert experts.max() <= E
    assert routing.weights.min() >= 0
    np.testing.assert_array_equal(np.where(experts == E, routing.weights, 0), 0)
    for row in experts:
        chosen = row[row < E]
        assert len(set(chosen)) == len(chosen), "an expert twice"
    np.testing.assert_allclose(gates.sum(axis=-1), routing.weights.sum(axis=-1), rtol=1e-5)
    if rule in SUMS:
        np.testing.assert_allclose(gates.sum(axis=-1), SUMS[rule], rtol=1e-5)
    elif rule not in RAW:
        assert gates.sum(axis=-1).max() <= 1 + 1e-5


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in BY_POSITION])
@few
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 40.0]))
def test_permuting_tokens_permutes_the_decision(rule, seed, scale):
    order = np.random.default_rng(seed + 1).permutation(T)
    logits = some_logits(seed, scale)
    _, gates = decide(rule)(logits, EVERY)
    _, permuted = decide(rule)(logits[order], EVERY)
    np.testing.assert_array_equal(permuted, gates[order])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in BY_POSITION | BY_EXPERT])
@few
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 40.0]))
def test_relabelling_experts_relabels_the_decision(rule, seed, scale):
    order = np.random.default_rng(seed + 1).permutation(E)
    logits = some_logits(seed, scale)
    routing, gates = decide(rule)(logits, EVERY)
    if rule in BY_SCORES:  # a tie goes to the first expert, whatever its label
        assume(all(len(set(row)) == E for row in routing.scores.tolist()))
    relabelled, relabelled_gates = decide(rule)(logits[:, order], EVERY)
    np.testing.assert_allclose(relabelled_gates, gates[:, order], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(losses(relabelled), losses(routing), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@few
@given(seed=seeds, scale=scales)
def test_masked_tokens_change_nothing(rule, seed, scale):
    rng = np.random.default_rng(seed + 1)
    mask, logits = rng.random(T) < 0.6, some_logits(seed, scale)
    other = np.where(mask[:, None], logits, some_logits(seed + 2, 100.0))
    routing, gates = decide(rule)(logits, mask)
    with_others, gates_with_others = decide(rule)(other, mask)
    np.testing.assert_array_equal(gates_with_others, gates)
    np.testing.assert_array_equal(gates[~mask], 0)
    np.testing.assert_array_equal(routing.present, mask)
    np.testing.assert_array_equal(losses(with_others), losses(routing))


@few
@given(seed=seeds, scale=scales, capacity=st.integers(1, T))
def test_no_expert_is_over_capacity(seed, scale, capacity):
    routing = moejax.top_k(some_logits(seed, scale), k=2)
    for priority in (moejax.by_choice, moejax.by_token_weight, moejax.by_weight):
        limited = moejax.limit_capacity(routing, capacity=capacity, priority=priority)
        expected = np.minimum(routing.counts, capacity)  # full before anything is dropped
        np.testing.assert_array_equal(limited.counts, expected)


@jax.jit
def outputs_of_slots(x, kernels, logits):
    """Of slots that take tokens, and of slots that mix them."""

    def linear(kernel, x):
        return x @ kernel

    taken, mixed = moejax.expert_choice(logits, capacity=2), moejax.soft_slots(logits[..., None])
    outputs = moejax.gather_slots(linear, kernels, x, taken)
    return outputs, moejax.mix_slots(linear, kernels, x, mixed)


@few
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 3.0]))
def test_permuting_tokens_permutes_the_outputs_of_slots(seed, scale):
    order = np.random.default_rng(seed).permutation(T)
    kernels = normal(seed + 2, E, 3, 2)
    x, logits = np.asarray(normal(seed + 1, T, 3)), some_logits(seed, scale)
    outputs = outputs_of_slots(x, kernels, logits)
    permuted = outputs_of_slots(x[order], kernels, logits[order])
    for of_permuted, output in zip(permuted, outputs, strict=True):
        expected = np.asarray(output)[order]
        np.testing.assert_allclose(of_permuted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_logits_are_decided_the_same_way_and_stay_finite(rule, value):
    logits = np.full((T, E), value, np.float32)
    routing, gates = decide(rule)(logits, EVERY)
    assert np.isfinite(gates).all()
    again = RULES[rule](logits)
    np.testing.assert_array_equal(routing.experts, again.experts)
    if rule in {"top_2", "switch", "top_2_raw"}:  # the lower index first
        np.testing.assert_array_equal(routing.experts, [list(range(routing.experts.shape[1]))] * T)


@pytest.mark.parametrize("rule", RULES)
def test_extreme_logits_leave_every_other_token_exact(rule):
    logits = some_logits(0, 1.0)
    extreme = logits.copy()
    extreme[2], extreme[4] = [1e4, -1e4, 1e4, -1e4], -1e4
    gates, with_extremes = (decide(rule)(one, EVERY)[1] for one in (logits, extreme))
    assert np.isfinite(with_extremes).all()
    if rule not in OVER_ALL_TOKENS:
        others = ~np.isin(np.arange(T), (2, 4))
        np.testing.assert_array_equal(with_extremes[others], gates[others])


@pytest.mark.parametrize("rule", RULES)
def test_a_token_that_is_not_a_number_leaves_every_other_token_exact(rule):
    logits = some_logits(0, 1.0)
    others = np.arange(T) != 2
    _, expected = decide(rule)(logits, others)
    _, gates = decide(rule)(np.where(others[:, None], logits, np.float32(np.nan)), EVERY)
    np.testing.assert_array_equal(gates[others], expected[others])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_lets_it_spoil_the_outputs_of_others(schedule):
    expert = EXPERTS["mlp"]
    params = params_of(moejax.stack(expert, E))
    run = jax.jit(lambda x, routing: SCHEDULES[schedule](expert.apply, params, x, routing))
    others = np.arange(T) != 2
    clean = np.asarray(normal(1, T, D)), some_logits(0, 1.0)
    spoiled = (np.where(others[:, None], leaf, np.float32(np.nan)) for leaf in clean)
    expected, y = (np.asarray(run(x, moejax.top_k(logits, k=2))) for x, logits in (clean, spoiled))
    np.testing.assert_allclose(y[others], expected[others], rtol=1e-6)
    assert np.isnan(y[2]).all()


@pytest.mark.parametrize("rule", sorted(RULES.keys() - ESTIMATED))
def test_gradients_in_float64(rule, x64):
    def evidence(logits):
        routing = RULES[rule](logits)
        return routing.gates, routing.scores

    check_gradients(evidence, 2 * np.random.default_rng(1).normal(size=(T, E)))


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_logits_are_promoted(rule):
    logits = some_logits(3, 1.0).astype(jnp.bfloat16)
    low, high = RULES[rule](logits), RULES[rule](logits.astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, low, high)
    assert low.weights.dtype == jnp.float32


def test_the_table_is_complete():
    """Every rule that the package offers is in the table."""
    offered = {
        getattr(moejax, name)
        for name in moejax.__all__
        if getattr(getattr(moejax, name), "__annotations__", {}).get("return") == "Routing"
    }
    offered -= {moejax.mask_tokens, moejax.limit_capacity}
    tested = {rule.func if isinstance(rule, partial) else rule for rule in RULES.values()}
    assert offered <= tested, {rule.__name__ for rule in offered - tested}
