"""The definition, `mixture` and `dense`, and what every schedule asks of an expert."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import moejax
from cases import EXPERTS, ONE_DEVICE, SCHEDULES, D, E, T, logits_for, normal, problem
from reference import close

LOGITS = logits_for("top_2")


def test_side_by_side_products_change_nothing():
    """With `matmul` all kernels stand side by side; without, `vmap` has its way."""
    expert, gates = EXPERTS["mlp"], softmax(normal(3, T, E), axis=-1)
    params, x = problem("mlp")
    plain = lambda params, x: expert.apply(params, x)  # noqa: E731

    def scalar(expert, scale):
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        return jnp.sum(moejax.mixture(expert, scaled, x, gates) ** 2)

    scales = jnp.array([0.5, 1.0])
    for transform in (jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.grad(jax.checkpoint(f))):
        each = [jax.vmap(transform(partial(scalar, f))) for f in (expert.apply, plain)]
        both = jax.jit(lambda scales, each=each: [derivative(scales) for derivative in each])
        np.testing.assert_allclose(*both(scales), rtol=1e-5)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_built_in_expert_may_be_wrapped(schedule, wrap):
    """`jit` and `checkpoint` keep the signature, `matmul` too, but take arrays only."""
    expert, run = EXPERTS["glu"], SCHEDULES[schedule]
    params, x = problem("glu")
    routing = moejax.top_k(LOGITS, k=2)
    y = jax.jit(partial(run, wrap(expert.apply)))(params, x, routing)
    close(y, moejax.dense(expert.apply, params, x, routing), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "dtype"),
    [
        (np.ones(T, np.float32), np.arange(E) * np.complex64(1j), jnp.complex64),
        (np.ones(T, np.int32), np.arange(E, dtype=np.int32), jnp.float32),
        (np.ones(T, np.float32), np.arange(E, dtype=np.int32), jnp.float32),
    ],
)
def test_the_sum_has_a_dtype_that_can_hold_it(schedule, tokens, outputs, dtype, recwarn):
    routing = moejax.top_k(LOGITS, k=2)
    expert = lambda output, x: jnp.broadcast_to(output, x.shape)  # noqa: E731
    y = jax.jit(partial(SCHEDULES[schedule], expert))(outputs, tokens, routing)
    assert y.dtype == dtype
    close(y, np.asarray(routing.gates) @ outputs, 1e-5)
    assert not recwarn.list


@pytest.mark.parametrize("schedule", ONE_DEVICE)
@pytest.mark.parametrize(
    "expert", [lambda params, x: x.sum(axis=0), lambda params, x: x[:3], lambda params, x: x.sum()]
)
def test_an_expert_must_answer_for_every_token(schedule, expert):
    params, x = {"unused": jnp.zeros(E)}, jnp.ones((T, D))
    routing = moejax.top_k(jnp.zeros((T, E)), k=2)
    with pytest.raises(ValueError, match="one output per token"):
        ONE_DEVICE[schedule](expert, params, x, routing)


@pytest.mark.parametrize("shape", [(T, 1), (1, E), (E,), (T, E, 1), (T, E + 1), (T + 1, E)])
def test_gates_that_would_broadcast_are_refused(shape):
    expert = EXPERTS["linear"]
    params, x = problem("linear")
    with pytest.raises(ValueError, match=re.escape(f"got {list(shape)} and leaves [[{E}]]")):
        moejax.mixture(expert.apply, params, x, jnp.ones(shape))


def test_experts_may_have_no_parameters():
    expert = lambda params, x: jnp.sin(x)  # noqa: E731
    _, x = problem("linear")
    routing = moejax.top_k(LOGITS, k=2)
    y = moejax.dense(expert, {}, x, routing)
    np.testing.assert_allclose(y, jnp.sin(x), rtol=1e-6)  # the gates sum to one
    np.testing.assert_allclose(y, moejax.dropless(expert, {}, x, routing), rtol=1e-6)


@pytest.mark.parametrize("num_experts", [4, 40])
def test_gates_by_expert_are_those_of_an_obvious_loop(num_experts):
    experts = np.array([[3, 0], [1, 2], [num_experts, 3], [0, 1]])  # E is nowhere
    weights = np.arange(1.0, 9.0, dtype=np.float32).reshape(experts.shape)
    scores = jnp.zeros((len(experts), num_experts))
    expected = np.zeros(scores.shape, np.float32)
    for t, k in np.ndindex(experts.shape):
        if experts[t, k] < num_experts:
            expected[t, experts[t, k]] += weights[t, k]
    routing = moejax.Routing(jnp.asarray(experts), jnp.asarray(weights), scores, scores)
    np.testing.assert_array_equal(routing.gates, expected)


@pytest.mark.parametrize("rule", [partial(moejax.top_k, k=2), moejax.relu, moejax.softmax])
@pytest.mark.parametrize("wrap", [lambda schedule: schedule, moejax.scale_inputs])
def test_no_tokens_make_no_outputs(rule, wrap):
    expert, params = EXPERTS["linear"].apply, problem("linear")[0]
    x, routing = np.zeros((0, D), np.float32), rule(np.zeros((0, E), np.float32))

    def total(schedule, params):
        y = wrap(schedule)(expert, params, x, routing)
        return y.sum(), y

    dense, dropless = (
        jax.jit(jax.value_and_grad(partial(total, schedule), has_aux=True))(params)
        for schedule in (moejax.dense, moejax.dropless)
    )
    jax.tree.map(np.testing.assert_array_equal, dense, dropless)
    assert dense[0][1].shape[0] == 0
