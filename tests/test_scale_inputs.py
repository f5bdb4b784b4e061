"""Gates that multiply what the experts read."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import EXPERTS, SCHEDULES, D, E, T, normal, params_of
from moejax.schedules.expert_parallel import expert_parallel

RULES = {
    "switch": moejax.switch,
    "sigmoid": partial(moejax.sigmoid_top_k, k=2, renormalize=False),
    "top_p": partial(moejax.top_p, p=0.6),
}


@partial(jax.jit, static_argnums=0)  # compiled once, for every token and expert
def term(expert, params, x, weights, t, k, e):
    """One expert's output for one token, its input scaled."""
    own = jax.tree.map(lambda leaf: leaf[e], params)
    return expert(own, weights[t, k] * x[t][None])[0]


def loop(expert, params, x, routing):
    """One expert on one token at a time."""
    rows = [0.0] * len(x)
    for t, k in np.ndindex(routing.experts.shape):
        e = int(routing.experts[t, k])
        if e < E:
            rows[t] = rows[t] + term(expert, params, x, routing.weights, t, k, e)
    return jnp.stack(rows)


def scalar(schedule, expert, route, params, x, logits):
    y = schedule(expert.apply, params, x, route(logits))
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y


EXPERT = EXPERTS["mlp"]  # with biases: zero in is not zero out


@cache
def tokens_and_logits():
    return params_of(moejax.stack(EXPERT, E)), normal(0, T, D), normal(1, T, E, scale=2)


@cache
def expected(rule):
    """By the loop."""
    run = partial(scalar, loop, EXPERT, RULES[rule])
    return jax.value_and_grad(run, (0, 1, 2), has_aux=True)(*tokens_and_logits())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gate_is_inside_the_expert(schedule, rule):
    run = partial(scalar, moejax.scale_inputs(SCHEDULES[schedule]), EXPERT, RULES[rule])
    got = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*tokens_and_logits())
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got, expected(rule))


def test_it_runs_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    expert, routing = moejax.glu(D, 5), moejax.top_k(normal(0, 16, 8), k=2)
    params, x = params_of(moejax.stack(expert, 8)), normal(1, 16, D)
    expected = moejax.scale_inputs(moejax.dense)(expert.apply, params, x, routing)
    execute = moejax.scale_inputs(expert_parallel(mesh))
    y = jax.jit(partial(execute, expert.apply))(params, x, routing)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_it_is_a_schedule_of_moe():
    model = moejax.moe(
        moejax.glu(D, 5),
        moejax.linear(D, E),
        num_experts=E,
        route=moejax.switch,
        execute=moejax.scale_inputs(moejax.dropless),
    )
    x = jnp.ones((2, 3, D), jnp.bfloat16)
    y, routing = model.apply(params_of(model), x)
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
