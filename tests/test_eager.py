"""Without `jit`, as in a notebook: a second call compiles nothing."""

from functools import partial

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

import moejax
from cases import ONE_DEVICE, params_of


@pytest.fixture
def compilations():
    """What is compiled, or taken from the cache, from here on."""
    events = []

    def listen(event, duration, **_):
        del duration
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def layer(execute):
    return moejax.moe(
        moejax.linear(4, 4),
        moejax.linear(4, 4),
        num_experts=4,
        route=partial(moejax.top_k, k=2),
        execute=execute,
    )


CASES = list(enumerate(ONE_DEVICE, start=61))


@pytest.mark.parametrize(("tokens", "schedule"), CASES, ids=ONE_DEVICE)
def test_a_second_call_compiles_nothing(tokens, schedule, compilations):
    x = jnp.ones((tokens, 4))  # as many as in no other test: equal layers share what they compiled

    def call(model, params):
        def loss(params):
            y, routing = model.apply(params, x)
            return jnp.sum(y) + moejax.load_balancing_loss(routing)

        return jax.grad(loss)(params)

    model = layer(ONE_DEVICE[schedule])
    params = params_of(model)
    call(model, params)
    assert compilations
    compilations.clear()
    call(model, params)
    assert not compilations
