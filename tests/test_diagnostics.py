"""Diagnostics on decisions small enough to work out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal

GATES = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
LABELS = np.array([0, 1, 1, 0])


@jax.jit
def decision(gates):
    experts = jnp.broadcast_to(jnp.arange(gates.shape[1], dtype=jnp.int32), gates.shape)
    return moejax.Routing(experts, gates, gates, jnp.zeros_like(gates))


@jax.jit
def masked(routing, t):
    """The same decision with token t turned into padding."""
    kept = (jnp.arange(len(routing.experts)) != t)[:, None]
    return routing._replace(
        experts=jnp.where(kept, routing.experts, routing.num_experts),
        weights=jnp.where(kept, routing.weights, 0),
        scores=jnp.where(kept, routing.scores, 0),
    )


# As one program; eagerly every operation is one.
expert_by_class = jax.jit(moejax.expert_by_class, static_argnums=2)


def test_load_is_the_share_of_choices():
    routing = moejax.top_k(jnp.array([[3.0, 2, 1, 0], [3, 1, 2, 0]]), k=2)
    np.testing.assert_allclose(moejax.expert_load(routing), [0.5, 0.25, 0.25, 0])
    assert int(moejax.dead_experts(routing)) == 1


def test_entropy_confidence_and_effective_number():
    gates = np.asarray(GATES, np.float64)
    rows = [-sum(p * np.log(p) for p in row if p > 0) for row in gates]
    mean = gates.mean(0)
    np.testing.assert_allclose(moejax.gate_entropy(decision(GATES)), np.mean(rows), rtol=1e-6)
    np.testing.assert_allclose(moejax.confidence(decision(GATES)), 0.6, rtol=1e-6)
    np.testing.assert_allclose(
        moejax.effective_experts(decision(GATES)), np.exp(-np.sum(mean * np.log(mean))), rtol=1e-6
    )


def test_entropy_normalises_weights_that_do_not_sum_to_one():
    np.testing.assert_allclose(
        moejax.gate_entropy(decision(0.25 * GATES)), moejax.gate_entropy(decision(GATES)), rtol=1e-6
    )


def test_class_table_and_its_information():
    table = expert_by_class(decision(GATES), LABELS, 2)
    np.testing.assert_allclose(table, [[1.3, 0.4], [0.6, 0.5], [0.1, 1.1]], rtol=1e-6)
    joint = np.asarray(table, np.float64) / 4
    expected = sum(
        joint[e, c] * np.log(joint[e, c] / joint[e].sum() / joint[:, c].sum())
        for e in range(3)
        for c in range(2)
    )
    np.testing.assert_allclose(moejax.mutual_information(table), expected, rtol=1e-5)


def test_labels_of_no_class_are_left_out():
    routing = moejax.switch(3 * np.eye(3, dtype=np.float32))
    table = expert_by_class(routing, np.array([1, -1, 2]), 2)
    np.testing.assert_array_equal(table, [[0, 1], [0, 0], [0, 0]])


def test_labels_may_be_narrower_than_the_classes():
    routing = moejax.switch(3 * np.eye(2, dtype=np.float32))
    table = expert_by_class(routing, np.array([0, 100], np.int8), 200)
    np.testing.assert_array_equal(np.argwhere(table), [[0, 0], [1, 100]])


def test_information_of_independent_and_of_identical():
    np.testing.assert_allclose(moejax.mutual_information(jnp.ones((3, 4))), 0, atol=1e-6)
    np.testing.assert_allclose(moejax.mutual_information(jnp.eye(4)), np.log(4), rtol=1e-6)


def test_information_of_a_collapse_is_not_negative():
    table = np.zeros((3, 10), np.float32)
    table[1] = np.arange(30, 40)
    assert float(moejax.mutual_information(table)) == 0


DIAGNOSTICS = [
    moejax.expert_load,
    moejax.dead_experts,
    moejax.gate_entropy,
    moejax.confidence,
    moejax.effective_experts,
]


@pytest.mark.parametrize("diagnostic", DIAGNOSTICS)
def test_masked_tokens_do_not_count(diagnostic):
    with_padding = diagnostic(masked(decision(GATES), 1))
    without = diagnostic(decision(np.delete(GATES, 1, axis=0)))
    np.testing.assert_allclose(with_padding, without, rtol=1e-6)


@pytest.mark.parametrize("diagnostic", DIAGNOSTICS)
def test_nothing_but_padding_is_finite(diagnostic):
    routing = decision(GATES)
    for t in range(4):
        routing = masked(routing, t)
    assert np.all(np.isfinite(diagnostic(routing)))


def test_labels_must_match_tokens():
    with pytest.raises(ValueError, match="one integer per token"):
        expert_by_class(decision(GATES), LABELS[:3], 2)


AVERAGES = moejax.effective_experts, moejax.confidence, moejax.gate_entropy


@jax.jit
def averages_and_gradients(logits):
    """Each of the averages where `relu` decides, and its gradient by the logits."""
    each = [lambda logits, of=of: of(moejax.relu(logits)) for of in AVERAGES]
    return [jax.value_and_grad(average)(logits) for average in each]


def test_a_token_without_a_gate_counts_for_no_expert():
    logits = np.asarray(normal(0, 1000, 8)) - np.float32(1.5)
    gates = np.maximum(np.asarray(logits, np.float64), 0)
    gates = gates[gates.any(axis=-1)]
    gates = gates / gates.sum(axis=-1, keepdims=True)
    assert len(gates) < 500
    entropies = -np.sum(gates * np.log(np.where(gates > 0, gates, 1)), axis=-1)
    mean = gates.mean(axis=0)
    effective = np.exp(-np.sum(mean * np.log(mean)))
    values, gradients = zip(*averages_and_gradients(logits), strict=True)
    expected = effective, gates.max(axis=-1).mean(), entropies.mean()
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert np.isfinite(gradients).all()
    table = expert_by_class(moejax.relu(logits), np.zeros(1000, np.int32), 1)
    np.testing.assert_allclose(np.sum(table), len(gates), rtol=1e-5)


def test_one_expert_is_one_expert():
    logits = jnp.array([[1.0], [-1.0], [-1.0]])
    np.testing.assert_allclose(moejax.effective_experts(moejax.relu(logits)), 1, rtol=1e-6)
    assert float(moejax.effective_experts(moejax.relu(-jnp.abs(logits)))) == 1


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-10])
def test_small_gates_are_normalised_with_a_finite_gradient(size):
    logits = np.float32(size) * np.float32([[3, 1], [1, -1]])
    values, gradients = zip(*averages_and_gradients(logits), strict=True)
    np.testing.assert_allclose(values[AVERAGES.index(moejax.confidence)], 0.875, rtol=1e-6)
    assert np.isfinite(gradients).all()


def test_a_choice_without_weight_is_none():
    active = moejax.relu(jnp.array([[-1.0, -2.0], [-1.0, -2.0], [-3.0, 1.0]]))
    np.testing.assert_array_equal(moejax.expert_load(active), [0, 1])
    assert int(moejax.dead_experts(active)) == 1
    assert int(moejax.dead_experts(moejax.relu(np.full((4, 3), -1, np.float32)))) == 3


def test_mutual_information_of_counts():
    counts = jnp.array([[3, 0], [0, 3]])
    np.testing.assert_allclose(moejax.mutual_information(counts), np.log(2), rtol=1e-6)


def test_a_choice_without_weight_is_not_dropped():
    before = moejax.relu(jnp.array([[1.0, -1.0], [2.0, -1.0], [-1.0, -1.0]]))
    after = jax.jit(lambda routing: moejax.limit_capacity(routing, capacity=1))(before)
    assert float(moejax.share_dropped(before, after)) == 0.5
