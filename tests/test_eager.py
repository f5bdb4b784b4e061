"""Without `jit`, as in a notebook: a second call compiles nothing."""

from functools import partial

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

import moejax
from cases import ONE_DEVICE, params_of
from reference import close


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


factor = 2.0


def scaled_by_a_global(x):
    return factor * x


class Holder:
    """An object that functions read."""

    def __init__(self):
        self.factor = 2.0

    def change(self):
        self.factor = 3.0

    def scale(self, x):
        return self.factor * x

    def __call__(self, x):
        return self.factor * x


def change_the_global(value):
    globals()["factor"] = value


def readings():
    """Functions of x that double it, each with a function that makes it treble x."""
    holder, cell = Holder(), 2.0

    def change_the_cell():
        nonlocal cell
        cell = 3.0

    listed = [2.0]
    inner = lambda x: cell * x  # noqa: E731
    return {
        "a global": (scaled_by_a_global, lambda: change_the_global(3.0)),
        "a global of an inner function": (
            lambda x: (lambda: factor)() * x,
            lambda: change_the_global(3.0),
        ),
        "a variable": (lambda x: cell * x, change_the_cell),
        "a function that reads one": (lambda x: inner(x), change_the_cell),
        "an object": (lambda x: holder.factor * x, holder.change),
        "a method": (holder.scale, holder.change),
        "a callable object": (holder, holder.change),
        "a list": (lambda x: listed[0] * x, lambda: listed.__setitem__(0, 3.0)),
        "a bound object": (partial(lambda holder, x: holder.factor * x, holder), holder.change),
        "a default": (lambda x, holder=holder: holder.factor * x, holder.change),
        "under vmap": (jax.vmap(lambda x: cell * x), change_the_cell),
    }


READ = list(readings())


@pytest.mark.parametrize("schedule", ["dense", "dropless"])
@pytest.mark.parametrize("kind", READ)
def test_what_an_expert_reads_may_change(kind, schedule):
    change_the_global(2.0)
    function, change = readings()[kind]
    routing, x = moejax.top_k(jnp.zeros((3, 4)), k=2), jnp.ones((3, 2))
    run = partial(ONE_DEVICE[schedule], lambda params, x: params * function(x), jnp.ones(4))
    assert run(x, routing)[0, 0] == 2
    change()
    assert run(x, routing)[0, 0] == 3


@pytest.mark.parametrize("kind", READ)
def test_what_a_layer_was_made_with_may_change(kind):
    change_the_global(2.0)
    function, change = readings()[kind]
    layer = moejax.mlp(2, 2, 2, activation=function)
    routing, x = moejax.top_k(jnp.zeros((3, 4)), k=2), jnp.ones((3, 2))
    params = params_of(moejax.stack(layer, 4))
    before = moejax.dropless(layer.apply, params, x, routing)
    change()
    after = moejax.dropless(layer.apply, params, x, routing)
    expected = moejax.dense(lambda params, x: layer.apply(params, x), params, x, routing)
    close(after, expected, 1e-5)
    assert abs(after - before).max() > 0.1


CONSTANT = [
    jax.nn.silu,
    jnp.tanh,
    jax.checkpoint(jnp.tanh),
    lambda x: 2.0 * x,
    scaled_by_a_global,
]


@pytest.mark.parametrize("function", CONSTANT)
def test_what_reads_constants_alone_is_compiled_once(function, compilations):
    routing, x = moejax.top_k(jnp.zeros((53, 4)), k=2), jnp.ones((53, 2))
    expert, params = (lambda params, x: params * function(x)), jnp.ones(4)
    moejax.dropless(expert, params, x, routing)
    assert compilations
    compilations.clear()
    moejax.dropless(expert, params, x, routing)
    assert not compilations
