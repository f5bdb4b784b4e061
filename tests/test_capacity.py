"""The capacity schedule: which choices it drops, and that it keeps the weights of the others."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, params_of
from reference import close

POWERS = np.float32([1, 10, 100, 1000])  # expert e multiplies by 10^e


@cache
def decided():
    return moejax.top_k(normal(0, 12, 4, scale=2), k=2)


def multiply(power, x):
    return power * x


def routing_to(experts):
    """Every choice with weight one; E is nowhere."""
    weights, scores = np.float32(np.less(experts, 4)), jnp.zeros((len(experts), 4))
    return moejax.Routing(jnp.array(experts), jax.device_put(weights), scores, scores)


def test_it_drops_second_choices_before_first_and_late_tokens_before_early():
    routing = routing_to([[1, 0], [0, 1], [0, 1], [4, 4], [0, 2]])
    y = moejax.capacity(multiply, POWERS, jnp.ones((5, 1)), routing, factor=0.8)  # two slots
    # Expert 0: tokens 1 and 2 by first choice, then token 4 is dropped, and token 0's second.
    # Expert 1: token 0 by first choice, token 1 by second; token 2's second is dropped.
    assert y[:, 0].tolist() == [10, 1 + 10, 1, 0, 100]


def test_it_keeps_the_other_weights():
    routing = routing_to([[0, 1], [0, 2], [0, 3]])
    w = np.float32(np.random.default_rng(2).random((3, 2)))
    routing = routing._replace(weights=jax.device_put(w))
    y = moejax.capacity(multiply, POWERS, jnp.ones((3, 1)), routing, factor=0.5)  # one slot
    close(y[:, 0], np.array([w[0, 0] + 10 * w[0, 1], 100 * w[1, 1], 1000 * w[2, 1]]))


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.0])
def test_the_capacity_schedule_drops_the_same_choices(factor):
    expert = moejax.linear(3, 2)
    params, x, routing = params_of(moejax.stack(expert, 4)), normal(1, 12, 3), decided()
    size = moejax.capacity_for(routing, factor=factor)
    expected = moejax.dense(expert.apply, params, x, moejax.limit_capacity(routing, capacity=size))
    y = moejax.capacity(expert.apply, params, x, routing, factor=factor)
    close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_it_refuses_impossible_factors(factor):
    with pytest.raises(ValueError, match="`factor` must be a positive number"):
        moejax.capacity(multiply, POWERS, jnp.ones((12, 3)), decided(), factor=factor)
