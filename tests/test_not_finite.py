"""Zero gates times values that are not finite: neither a value nor a gradient may notice."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import ONE_DEVICE, D, E, normal
from reference import close

T, PADDING = 6, 2


def exponential(params, x, *, matmul=jnp.matmul):
    """Infinite, with an infinite derivative, where the last expert sees a token."""
    return jnp.exp(matmul(x, params["kernel"]))


def unit(params, x, *, matmul=jnp.matmul):
    """No number at zero, and no derivative."""
    y = matmul(x, params["kernel"])
    return y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True))


EXPERTS = {"overflows": exponential, "undefined at zero": unit}
RULES = {
    "softmax": moejax.softmax,
    "top_2": partial(moejax.top_k, k=2),
    "switch": moejax.switch,
    "relu": moejax.relu,
}


def tokens():
    return jax.device_put(np.abs(normal(1, T, D)))


def params(last):
    """Kernels of E experts, the last one times a number."""
    factors = np.float32([1] * (E - 1) + [last])
    return {"kernel": jax.device_put(factors[:, None, None] * normal(0, E, D, D))}


def avoiding_the_last(key):
    del key
    return {"bias": jnp.array([2.0, 1.0, 0.5, -100.0])}


def router_logits(params, x):
    return x @ jnp.full((D, E), 0.1) + params["bias"][None]


ROUTER = moejax.Layer(avoiding_the_last, router_logits)


@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_an_expert_that_was_not_chosen_may_overflow(schedule):
    execute = ONE_DEVICE[schedule]
    expert = moejax.Layer(lambda key: {"kernel": jnp.ones((D, D))}, exponential)
    model = moejax.moe(expert, ROUTER, num_experts=E, route=RULES["top_2"], execute=execute)
    x = tokens()

    @jax.jit
    def value_and_gradients(experts):
        def loss(params, x):
            return jnp.sum(model.apply(params, x)[0] ** 2)

        given = {"router": ROUTER.init(None), "experts": experts}
        return jax.value_and_grad(loss, argnums=(0, 1))(given, x)

    value, (gradients, to_tokens) = value_and_gradients(params(1e3))
    expected, (same, same_to_tokens) = value_and_gradients(params(1.0))
    close((value, to_tokens), (expected, same_to_tokens))
    close(gradients, same)
    np.testing.assert_array_equal(gradients["experts"]["kernel"][-1], 0)


def value_and_gradients_of_units(rule, execute, x, mask):
    """Of a mixture of units, a shared one among them, and of a loss of its routing."""
    expert = moejax.Layer(lambda key: {"kernel": jnp.eye(D)}, unit)
    mixture = moejax.moe(expert, ROUTER, num_experts=E, route=RULES[rule], execute=execute)
    model = moejax.with_shared(mixture, expert)
    routed = {"router": ROUTER.init(None), "experts": params(1.0)}
    given = {"routed": routed, "shared": expert.init(None)}

    def loss(params):
        y, routing = model.apply(params, x, mask=mask)
        return jnp.sum(y**2) + moejax.router_z_loss(routing)

    return jax.jit(jax.value_and_grad(loss))(given)


@cache
def without_padding(rule):
    there = jax.device_put(np.ones(T - PADDING, bool))
    return value_and_gradients_of_units(rule, moejax.dense, tokens()[:-PADDING], there)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_padding_changes_nothing_whatever_the_expert_does_at_zero(schedule, rule):
    execute = ONE_DEVICE[schedule]
    mask = np.arange(T) < T - PADDING
    padded = np.where(mask[:, None], tokens(), np.float32(np.nan))
    got = value_and_gradients_of_units(rule, execute, *jax.device_put((padded, mask)))
    close(got, without_padding(rule))


def test_a_switch_between_one_and_infinity():
    expert = lambda params, x: x * params * 1e20  # noqa: E731
    routing = moejax.switch(jnp.array([[5.0, 0.0]]))
    for schedule in ONE_DEVICE.values():
        y = schedule(expert, jnp.array([1.0, 1e30]), jnp.ones((1, 1)), routing)
        np.testing.assert_allclose(y, routing.weights * 1e20, rtol=1e-6)


def divided(params, x, *, matmul=jnp.matmul):
    """No number where the product is zero, and no derivative by what is divided by it."""
    y = matmul(x, params["kernel"])
    return x / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True))


def unit_and_divided(params, x, *, matmul=jnp.matmul):
    return jnp.stack([f(params, x, matmul=matmul) for f in (unit, divided)], axis=1)


def output_and_gradients(schedule, x, routing):
    def scalar(params, x, routing):
        y = ONE_DEVICE[schedule](unit_and_divided, params, x, routing)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    (_, y), gradients = run(params(1.0), x, routing)
    return y, *gradients


@cache
def of_those_present():
    """By the definition, without the tokens that go nowhere; zeros stand where they were."""
    x, routing = jax.device_get((tokens(), moejax.top_k(normal(3, T, E), k=2)))
    x, routing = jax.tree.map(lambda leaf: leaf[: T - PADDING], (x, routing))
    y, to_params, to_x = output_and_gradients("dense", x, routing)
    y, to_x = (np.pad(a, [(0, PADDING)] + [(0, 0)] * (a.ndim - 1)) for a in (y, to_x))
    return y, to_params, to_x


@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_a_schedule_by_itself_leaves_out_what_goes_nowhere(schedule):
    routing, here = moejax.top_k(normal(3, T, E), k=2), np.arange(T) < T - PADDING
    routing = moejax.mask_tokens(routing, jax.device_put(here))
    got = output_and_gradients(schedule, tokens(), routing)
    close(got, of_those_present(), rtol=1e-5)
