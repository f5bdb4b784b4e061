"""Limits: published numbers, the obvious queue, and what is dropped."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, params_of
from reference import golden, loop

LOGITS = normal(0, 12, 4, scale=2)
# As one program each; eagerly every operation is one.
limit_capacity = jax.jit(moejax.limit_capacity, static_argnames=("capacity", "priority"))
positions = jax.jit(moejax.positions, static_argnames="priority")
PRIORITIES = [moejax.by_choice, moejax.by_token, moejax.by_token_weight, moejax.by_weight]


@cache
def decided():
    return moejax.top_k(LOGITS, k=2)


def combine(routing, capacity):
    """The gates by expert and slot, [T, E, C]."""
    tensor = np.zeros((*routing.scores.shape, capacity))
    routing, places = jax.device_get((routing, positions(routing)))
    for t, k in np.argwhere(np.asarray(routing.chosen)):
        if places[t, k] < capacity:
            tensor[t, routing.experts[t, k], places[t, k]] = routing.weights[t, k]
    return tensor


@pytest.mark.parametrize(
    ("name", "renormalize"), [("vmoe_top_2_capacity_4", False), ("praxis_top_2_capacity_4", True)]
)
def test_slots_are_those_of(name, renormalize):
    peer = golden(name)
    routing = moejax.top_k(jnp.asarray(peer["logits"]), k=2, renormalize=renormalize)
    np.testing.assert_allclose(combine(routing, 4), peer["combine"], rtol=1e-6)
    limited = limit_capacity(routing, capacity=4)
    np.testing.assert_allclose(limited.gates, peer["combine"].sum(-1), rtol=1e-6)
    if "over_capacity" in peer:
        over = 1 - np.mean(limited.chosen, axis=0)
        np.testing.assert_allclose(over, peer["over_capacity"], rtol=1e-6)


def served_first(name):
    """The sort keys of a choice (t, k), as plain numbers."""
    weights = np.asarray(decided().weights)
    return {
        "by_choice": lambda t, k: (k, t),
        "by_token": lambda t, k: (t, k),
        "by_token_weight": lambda t, k: (k, -weights[t].max(), t),
        "by_weight": lambda t, k: (-weights[t, k], k, t),
    }[name]


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("capacity", [1, 3, 24])
def test_an_obvious_queue(priority, capacity):
    routing, left = decided(), [capacity] * 4
    expected = np.zeros((12, 2), bool)
    choices = [(t, k) for t in range(12) for k in range(2)]
    for t, k in sorted(choices, key=lambda choice: served_first(priority.__name__)(*choice)):
        e = int(routing.experts[t, k])
        expected[t, k] = left[e] > 0
        left[e] -= 1
    limited = moejax.limit_capacity(routing, capacity=capacity, priority=priority)
    np.testing.assert_array_equal(limited.chosen, expected)
    np.testing.assert_array_equal(limited.weights, np.where(expected, routing.weights, 0))
    np.testing.assert_array_equal(limited.scores, routing.scores)
    assert int(limited.counts.max()) <= capacity
    dropped = moejax.share_dropped(routing, limited)
    np.testing.assert_allclose(dropped, 1 - expected.mean(), rtol=1e-6)


def test_equal_weights_are_served_in_the_order_of_tokens():
    routing = moejax.top_k(np.zeros((5, 3), np.float32), k=2)
    for priority in (moejax.by_token_weight, moejax.by_weight):
        np.testing.assert_array_equal(jax.jit(priority)(routing), moejax.by_choice(routing))


def test_masked_tokens_take_no_capacity():
    masked = jax.jit(moejax.mask_tokens)(decided(), np.arange(12) >= 6)
    limited = limit_capacity(masked, capacity=2)
    alone = limit_capacity(moejax.top_k(np.asarray(LOGITS)[6:], k=2), capacity=2)
    experts = np.asarray(limited.experts)
    np.testing.assert_array_equal(experts[6:], alone.experts)
    np.testing.assert_array_equal(experts[:6], 4)
    assert float(moejax.share_dropped(masked, masked)) == 0


def test_a_second_choice_left_out_takes_no_capacity():
    numbers = np.ones((3, 2), np.float32)
    routing = moejax.Routing(jnp.array([[0, 1], [0, 2], [0, 1]]), numbers, numbers, numbers)
    np.testing.assert_array_equal(positions(routing), [[0, 0], [1, 0], [2, 1]])


def first_served(logits, priority):
    """What is left of token 0's choices."""
    routing = moejax.top_k(jnp.array(logits), k=2)
    return moejax.limit_capacity(routing, capacity=1, priority=priority).experts.tolist()[0]


@pytest.mark.parametrize("priority", PRIORITIES)
def test_by_token_alone_does_not_look_ahead(priority):
    """Expert 1 is the second choice of token 0, and the first of a later token."""
    now, later = [3.0, 2.0, 0.0], [[0.0, 9.0, 5.0], [5.0, 0.0, 9.0]]
    outcomes = {tuple(first_served([now, token], priority)) for token in later}
    assert (len(outcomes) == 1) == (priority is moejax.by_token), outcomes


@pytest.mark.parametrize("num_tokens", [1, 5, 11])
def test_by_token_decides_for_a_prefix_what_it_decides_for_the_whole(num_tokens):
    limit = partial(limit_capacity, capacity=3, priority=moejax.by_token)
    whole = np.asarray(limit(decided()).experts)[:num_tokens]
    prefix = limit(moejax.top_k(np.asarray(LOGITS)[:num_tokens], k=2)).experts
    np.testing.assert_array_equal(whole, prefix)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_positions_are_those_of_a_walk_along_the_queue(priority):
    experts = np.where(np.arange(24).reshape(12, 2) % 5 == 0, 4, decided().experts)
    experts[3, 1] = -1  # nowhere, as is 4
    routing = decided()._replace(experts=jax.device_put(experts))
    places = np.asarray(moejax.positions(routing, priority=priority)).ravel()
    queues = [[] for _ in range(5)]
    for choice in np.asarray(priority(routing)):
        expert = int(experts.ravel()[choice])
        queue = queues[expert if 0 <= expert < 4 else 4]
        assert places[choice] == len(queue)
        queue.append(choice)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_more_choices_than_int32_can_number_are_refused(priority):
    num_tokens = 2**30
    one = jax.ShapeDtypeStruct((num_tokens, 2), jnp.float32)
    ids = jax.ShapeDtypeStruct((num_tokens, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"At most 2\^31 - 1 choices .* got 2147483648"):
        jax.eval_shape(
            partial(moejax.positions, priority=priority), moejax.Routing(ids, one, one, one)
        )


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_factor_is_a_multiple_of_the_mean_load(factor):
    assert moejax.capacity_for(decided(), factor=factor) == np.ceil(factor * 12 * 2 / 4)


@pytest.mark.parametrize(
    ("rule", "slots"),
    [(moejax.relu, 12), (partial(moejax.top_p, p=0.5), 12), (partial(moejax.top_p, p=0.5, k=2), 6)],
)
def test_a_factor_counts_the_columns_of_a_decision(rule, slots):
    assert moejax.capacity_for(rule(LOGITS), factor=1.0) == slots


def test_every_schedule_runs_what_is_left_and_the_layer_returns_what_was_decided():
    expert = moejax.linear(3, 2)

    def execute(expert, params, x, routing):
        return moejax.dropless(expert, params, x, moejax.limit_capacity(routing, capacity=2))

    layer = moejax.moe(
        expert,
        moejax.linear(3, 4),
        num_experts=4,
        route=partial(moejax.top_k, k=2),
        execute=execute,
    )
    params, x = params_of(layer), normal(1, 12, 3)
    y, routing = jax.jit(layer.apply)(params, x)
    assert np.all(routing.chosen)
    limited = moejax.limit_capacity(routing, capacity=2)
    np.testing.assert_allclose(
        y, loop(expert.apply, params["experts"], x, limited), rtol=1e-5, atol=1e-6
    )


def test_a_factor_that_is_exact_in_decimals_makes_no_slot_too_many():
    routing = moejax.top_k(np.zeros((10, 2), np.float32), k=2)
    assert moejax.capacity_for(routing, factor=1.1) == 11


def test_useless_requests_are_refused():
    with pytest.raises(ValueError, match="must be an integer"):
        moejax.limit_capacity(moejax.switch(jnp.zeros((2, 2))), capacity=1.5)
    with pytest.raises(ValueError, match="at least 1 slot"):
        moejax.limit_capacity(decided(), capacity=0)
    with pytest.raises(ValueError, match="positive"):
        moejax.capacity_for(decided(), factor=0.0)
    with pytest.raises(ValueError, match="positive"):
        moejax.capacity_for(decided(), factor=float("nan"))


IDLE = np.float32([[-1.0, -1.0]] * 7 + [[5.0, -1.0]])  # of `relu`: the last token alone is active


@pytest.mark.parametrize(
    "priority", [moejax.by_choice, moejax.by_token, moejax.by_token_weight, moejax.by_weight]
)
def test_choices_of_weight_zero_take_no_slot_of_others(priority):
    limited = moejax.limit_capacity(moejax.relu(IDLE), capacity=1, priority=priority)
    assert np.asarray(limited.gates)[7].tolist() == [5, 0]
    assert np.asarray(limited.counts)[0] == 1


def test_the_capacity_schedule_serves_choices_of_weight_zero_last():
    y = moejax.capacity(
        lambda p, x: p * x, np.ones(2), np.ones((8, 1)), moejax.relu(IDLE), factor=0.1
    )
    np.testing.assert_array_equal(np.ravel(y), [*[0] * 7, 5])
