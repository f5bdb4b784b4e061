"""Gates that multiply what the experts read."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import EXPERTS, SCHEDULES, D, E, O, T, normal, params_of
from moejax.schedules.expert_parallel import expert_parallel
from reference import chosen, close, expert_by

RULES = {
    "switch": moejax.switch,
    "sigmoid": partial(moejax.sigmoid_top_k, k=2, renormalize=False),
    "top_p": partial(moejax.top_p, p=0.6),
}


EXPERT = EXPERTS["mlp"].apply  # with biases: zero in is not zero out
COTANGENT = np.cos(np.arange(T * O, dtype=np.float32)).reshape(T, O)


@cache
def problem(rule):
    """Parameters, tokens, and a decision with room for E choices: all rules share a program."""
    params = params_of(moejax.stack(EXPERTS["mlp"], E))
    routing = jax.device_get(RULES[rule](normal(1, T, E, scale=2)))
    missing = ((0, 0), (0, E - routing.experts.shape[1]))
    experts = np.pad(routing.experts, missing, constant_values=E)
    weights = np.pad(routing.weights, missing)
    return params, normal(0, T, D), moejax.Routing(experts, weights, *routing[2:])


@jax.jit  # compiled once, for every token and expert
def term_and_gradients(cotangent, params, x, weights, where, t, e):
    """One expert's output for one token, its input scaled."""

    def term(params, x, weights):
        return EXPERT(expert_by(params, e), weights[where] * x[t][None])[0]

    output, pull = jax.vjp(term, params, x, weights)
    return output, pull(cotangent)


@cache
def expected(rule):
    """One expert on one token at a time."""
    params, x, routing = problem(rule)
    y, gradients = np.zeros((T, O)), jax.tree.map(np.zeros_like, (params, x, routing.weights))
    for where, t, e in chosen(routing, T):
        given = params, x, routing.weights, where, t, e
        output, of_term = term_and_gradients(COTANGENT[t], *given)
        y[t] += output
        gradients = jax.tree.map(np.add, gradients, of_term)
    return y, gradients


@cache
def compiled(schedule):
    execute = moejax.scale_inputs(SCHEDULES[schedule])

    def run(params, x, routing):
        def output(params, x, weights):
            return execute(EXPERT, params, x, routing._replace(weights=weights))

        y, pull = jax.vjp(output, params, x, routing.weights)
        return y, pull(COTANGENT)

    return jax.jit(run)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gate_is_inside_the_expert(schedule, rule):
    close(compiled(schedule)(*problem(rule)), expected(rule), rtol=1e-4, atol=1e-5)


def test_it_runs_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    expert, routing = moejax.glu(D, 5), moejax.top_k(normal(0, 16, 8), k=2)
    params, x = params_of(moejax.stack(expert, 8)), normal(1, 16, D)
    y, expected = (
        jax.jit(partial(moejax.scale_inputs(schedule), expert.apply))(params, x, routing)
        for schedule in (expert_parallel(mesh), moejax.dense)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_it_is_a_schedule_of_moe():
    model = moejax.moe(
        moejax.glu(D, 5),
        moejax.linear(D, E),
        num_experts=E,
        route=moejax.switch,
        execute=moejax.scale_inputs(moejax.dropless),
    )
    x = np.ones((2, 3, D), jnp.bfloat16)
    y, routing = jax.jit(model.apply)(params_of(model), x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert routing.experts.shape == (6, 1)


def test_other_decisions_are_refused():
    decision = moejax.expert_choice(jnp.zeros((T, E)), capacity=2)
    with pytest.raises(ValueError, match="decision of type Routing"):
        moejax.scale_inputs(moejax.dense)(lambda p, x: x, {}, jnp.ones((T, D)), decision)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool])
def test_tokens_that_cannot_be_scaled_are_refused(dtype):
    routing, x = moejax.switch(jnp.zeros((T, E))), jnp.ones((T, D), dtype)
    with pytest.raises(ValueError, match=f"`scale_inputs` takes floats, .* got {x.dtype}"):
        moejax.scale_inputs(moejax.dense)(lambda p, x: x, {}, x, routing)
