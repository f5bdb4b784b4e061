"""Gradients kept in the optimizer's state: the same numbers, in memory that is taken once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax
from cases import params_of
from moejax.training import init_state, keep_gradients, scan_batches, train_step

# Optax's Adam raises a float to the power of an integer count, which strict promotion refuses.
pytestmark = pytest.mark.usefixtures("standard_promotion")

E, D = 8, 4
OPTIMIZER = optax.adam(0.1)
X = np.float32(np.random.default_rng(0).normal(size=(3, 24, D)))  # three batches
MIXTURE = moejax.moe(
    moejax.linear(D, D),
    moejax.linear(D, E, bias=False),
    num_experts=E,
    route=partial(moejax.top_k, k=2),
    execute=moejax.dense,  # the quickest to compile
)


def loss(params, x, key):
    y, routing = MIXTURE.apply(params, x)
    return jnp.mean((y - x) ** 2) + 0.01 * moejax.load_balancing_loss(routing), {}


def start(optimizer):
    return jax.jit(partial(init_state, optimizer=optimizer))(
        params_of(MIXTURE), key=jax.random.key(1)
    )


def donating(optimizer):
    return jax.jit(train_step(loss, optimizer), donate_argnums=0)


def addresses(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_steps_give_the_same_bits():
    kept, plain = keep_gradients(OPTIMIZER), OPTIMIZER
    states = {optimizer: start(optimizer) for optimizer in (kept, plain)}
    steps = {optimizer: donating(optimizer) for optimizer in states}
    for x in X:
        for optimizer, step in steps.items():
            states[optimizer], _ = step(states[optimizer], x)
    expected, state = states[plain], states[kept]
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.opt_state.inner),
        (expected.params, expected.opt_state),
    )


def test_the_state_has_the_gradients_of_the_last_step():
    optimizer = keep_gradients(OPTIMIZER)
    state = start(optimizer)
    expected = jax.jit(jax.grad(lambda params: loss(params, X[0], None)[0]))(state.params)
    state, _ = jax.jit(train_step(loss, optimizer))(state, X[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
        state.opt_state.gradients,
        expected,
    )


@pytest.mark.usefixtures("optimized")
def test_a_donated_state_stays_in_its_memory():
    optimizer = keep_gradients(OPTIMIZER)
    state, step = start(optimizer), donating(optimizer)
    state, _ = step(state, X[0])
    held = state.params, state.opt_state
    before = addresses(held)
    # The compiled program says that it writes each of these arrays over the one it was given.
    memory = step.lower(state, X[1]).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    state, _ = step(state, X[1])
    assert addresses((state.params, state.opt_state)) == before


def test_it_goes_around_a_chain_and_passes_its_arguments_on():
    def scaled():
        def update(updates, state, params=None, *, by):
            return jax.tree.map(lambda u: by * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    chain = keep_gradients(optax.chain(optax.clip_by_global_norm(1.0), scaled(), optax.sgd(1.0)))
    params, gradients = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    updates, state = chain.update(gradients, chain.init(params), params, by=10.0)
    np.testing.assert_allclose(updates["w"], [-6.0, -8.0], rtol=1e-6)
    np.testing.assert_array_equal(state.gradients["w"], gradients["w"])  # as they came


def test_it_runs_in_scan_and_vmap():
    optimizer = keep_gradients(OPTIMIZER)
    step = train_step(lambda params, x, key: (jnp.sum((params - x) ** 2), {}), optimizer)

    def run(key):
        state = init_state(jax.random.normal(key, (D,)), optimizer, key)
        return scan_batches(step, state, X[0], jnp.arange(24).reshape(6, 4))[0].params

    keys, one = jax.random.split(jax.random.key(0), 2), jax.jit(run)
    expected = np.stack([one(key) for key in keys])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(keys), expected, rtol=1e-6)
