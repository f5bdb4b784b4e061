"""Training: the step, the order of examples, the scan, and the look inside."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cases import normal
from moejax.training import (
    Masked,
    batch_sizes,
    empty_metrics,
    epoch_order,
    init_state,
    inspect_step,
    keep_gradients,
    scan_batches,
    train_epoch,
    train_step,
    train_until,
)

# Optax's Adam raises a float to the power of an integer count, which strict promotion refuses.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = normal(0, 10, 3)
ADAM, OPTIMIZER = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)  # the second compiles faster


def loss(params, batch, key):
    error = batch @ params["w"] - 1
    return jnp.mean(error**2), {"noise": jax.random.uniform(key)}


def start(seed=0, optimizer=OPTIMIZER):
    return init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(seed))


STEP = train_step(loss, OPTIMIZER)
epoch_in_jit = jax.jit(train_epoch, static_argnums=0, static_argnames="batch_size")


def test_a_step_is_what_optax_does_by_hand():
    state, metrics = jax.jit(train_step(loss, ADAM))(start(optimizer=ADAM), X)
    params = {"w": np.ones(3, np.float32)}

    @jax.jit
    def by_hand(params):
        value, gradients = jax.value_and_grad(lambda p: loss(p, X, jax.random.key(0))[0])(params)
        return value, ADAM.update(gradients, ADAM.init(params), params)

    value, (updates, opt_state) = by_hand(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], params["w"] + updates["w"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.opt_state, opt_state
    )
    assert state.step == 1


def test_every_epoch_sees_every_example_once_in_another_order():
    orders = [epoch_order(start(), epoch, 10) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(10)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(orders[1], epoch_order(start(), 1, 10))
    assert not np.array_equal(orders[0], epoch_order(start(seed=1), 0, 10))


def test_an_epoch_is_its_steps_one_by_one():
    state, by_hand = start(), start()
    step = jax.jit(STEP)
    for epoch in range(2):
        state, metrics = epoch_in_jit(STEP, state, X, batch_size=4)
        order = np.asarray(epoch_order(by_hand, epoch, 10))
        batches = [order[:4], order[4:8], order[8:]]
        losses = []
        for rows in batches:
            by_hand, one = step(by_hand, np.asarray(X)[rows])
            losses.append(one["loss"])
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], by_hand.params["w"], rtol=1e-5)
    assert state.step == by_hand.step == 6
    assert batch_sizes(10, 4) == (4, 4, 2)


def masked_loss(params, batch, key):
    error = batch.data @ params["w"] - 1
    return jnp.mean(error**2, where=batch.mask), {}


MASKED_STEP = train_step(masked_loss, OPTIMIZER)
ALL = jax.device_put(np.ones(len(X), bool))


def steps_compiled(step, data, batch_size):
    """How many copies of the step are in the program of an epoch, by their matrix products."""
    run = jax.jit(lambda state: train_epoch(step, state, data, batch_size=batch_size))
    whole = jax.jit(lambda state: train_epoch(step, state, data, batch_size=5))
    count = lambda function: function.lower(start()).as_text().count("dot_general")  # noqa: E731
    return count(run) / count(whole)


def test_a_loss_that_reads_a_mask_is_compiled_once():
    assert steps_compiled(MASKED_STEP, Masked(X, ALL), 4) == 1
    assert steps_compiled(STEP, X, 4) == 2


def test_a_last_batch_that_is_filled_up_gives_the_numbers_of_a_smaller_one():
    filled, metrics = epoch_in_jit(MASKED_STEP, start(), Masked(X, ALL), batch_size=4)
    smaller, expected = epoch_in_jit(STEP, start(), X, batch_size=4)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(filled.params["w"], smaller.params["w"], rtol=1e-6)


def test_examples_that_the_mask_leaves_out_do_not_count():
    kept, hostile = np.array(ALL), np.array(X)
    kept[[2, 7]], hostile[[2, 7]] = False, 1e3
    _, metrics = epoch_in_jit(MASKED_STEP, start(), Masked(hostile, kept), batch_size=10)
    _, expected = epoch_in_jit(STEP, start(), np.asarray(X)[kept], batch_size=8)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("mask", [np.ones(10), np.ones((10, 1), bool)])
def test_a_mask_is_one_boolean_per_example(mask):
    with pytest.raises(ValueError, match=r"must be bool \[N\]"):
        train_epoch(MASKED_STEP, start(), Masked(X, mask), batch_size=4)


def test_noise_differs_by_step_and_repeats_by_seed():
    run = jax.jit(lambda state: scan_batches(STEP, state, X, np.arange(8).reshape(4, 2)))
    (_, metrics), (_, again) = run(start()), run(start())
    assert len(set(metrics["noise"].tolist())) == 4
    np.testing.assert_array_equal(metrics["noise"], again["noise"])


def test_inspecting_a_step_tells_what_the_step_does():
    [record] = inspect_step(loss, OPTIMIZER, start(), X)
    state, _ = jax.jit(STEP)(start(), X)
    assert (record.path, record.shape) == ("w", (3,))
    error = np.asarray(X) @ np.ones(3, np.float32) - 1
    expected = 2 * error @ np.asarray(X) / len(error)
    np.testing.assert_allclose(record.gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(record.value + record.update, state.params["w"], rtol=1e-6)


def test_inspecting_a_step_draws_the_noise_of_the_step():
    def noisy(params, batch, key):
        return jnp.sum(params["w"] * jax.random.normal(key, (3,))), {}

    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    state = state._replace(step=state.step + 3)
    [record] = inspect_step(noisy, optimizer, state, X)
    after, _ = jax.jit(train_step(noisy, optimizer))(state, X)
    np.testing.assert_allclose(record.value + record.update, after.params["w"], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_size_out_of_range(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and .* \\(10\\), got {batch_size}"):
        train_epoch(STEP, start(), X, batch_size=batch_size)


def test_an_epoch_compiles_once():
    state, _ = epoch_in_jit(STEP, start(), X, batch_size=5)
    with jax.no_tracing():
        epoch_in_jit(STEP, state, X, batch_size=5)


def pair_loss(params, batch, key):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2), {}


PAIR_STEP = train_step(pair_loss, OPTIMIZER)


def by_indices(data):
    return scan_batches(PAIR_STEP, start(), data, np.arange(8).reshape(2, 4))


def by_epoch(data):
    return train_epoch(PAIR_STEP, start(), data, batch_size=4)


def by_pieces(data):
    metrics = {"loss": jnp.zeros(3)}
    order = np.asarray(epoch_order(start(), 0, 10))
    return train_until(PAIR_STEP, start(), metrics, data, order, 3, batch_size=4)


def by_shapes(data):
    return empty_metrics(PAIR_STEP, start(), data, batch_size=4)


@pytest.mark.parametrize("run", [by_indices, by_epoch, by_pieces, by_shapes])
@pytest.mark.parametrize("data", [(X, X[:7, 0]), (X[:7], X[:, 0]), (X, X[0, 0]), ()])
def test_arrays_of_other_lengths_are_refused(run, data):
    shapes = [list(leaf.shape) for leaf in data]
    with pytest.raises(
        ValueError, match=re.escape(f"with one N, the number of examples, got shapes {shapes}")
    ):
        run(data)


@pytest.mark.parametrize("length", [9, 11])
def test_the_order_must_be_that_of_the_data(length):
    order = epoch_order(start(), 0, length)
    with pytest.raises(ValueError, match=rf"each of the 10 examples, got \[{length}\]"):
        train_until(STEP, start(), {"loss": jnp.zeros(3)}, X, order, 3, batch_size=4)


@pytest.mark.parametrize("run", [by_indices, by_epoch, by_pieces])
def test_numpy_data_trains_outside_of_jit(run):
    data = X, X[:, 0]
    state, metrics = run(jax.tree.map(np.asarray, data))
    expected, expected_metrics = run(data)
    np.testing.assert_array_equal(state.params["w"], expected.params["w"])
    np.testing.assert_array_equal(metrics["loss"], expected_metrics["loss"])


def test_no_metric_replaces_the_loss():
    named_loss = lambda params, batch, key: (jnp.sum(params["w"]), {"loss": jnp.ones(())})  # noqa: E731
    with pytest.raises(ValueError, match='called "loss"'):
        jax.eval_shape(train_step(named_loss, OPTIMIZER), start(), X)


def plateau_of(update):
    """Adam whose rate halves where the loss stays, with another function to update it."""
    optimizer = optax.chain(OPTIMIZER, optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    return optax.GradientTransformationExtraArgs(optimizer.init, update(optimizer))


def test_an_optimizer_that_asks_for_the_loss_gets_it():
    seen = []

    def recording(optimizer):
        def update(updates, state, params=None, *, value, **extra):
            seen.append(value)
            return optimizer.update(updates, state, params, value=value, **extra)

        return update

    optimizer = plateau_of(recording)
    state = init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    _, metrics = train_step(loss, optimizer)(state, X)
    [record] = inspect_step(loss, optimizer, state, X)
    assert seen == [metrics["loss"], metrics["loss"]]
    assert jnp.isfinite(record.update).all()


@pytest.mark.parametrize("around", [lambda one: one, keep_gradients])
def test_an_optimizer_of_many_steps_passes_the_loss_on(around):
    several = optax.MultiSteps(plateau_of(lambda optimizer: optimizer.update), every_k_schedule=2)
    optimizer = around(several)
    state = init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    step = train_step(loss, optimizer)
    for expected in (0, 1):
        own = getattr(state.opt_state, "inner", state.opt_state)
        assert own.inner_opt_state[1].avg_value.dtype == jnp.float32
        state, _ = step(state, X)
        own = getattr(state.opt_state, "inner", state.opt_state)
        assert own.gradient_step == expected
    [record] = inspect_step(loss, optimizer, state, X)
    assert jnp.isfinite(record.update).all()


def test_the_rate_falls_where_the_loss_stays():
    optimizer = plateau_of(lambda optimizer: optimizer.update)
    flat = lambda params, batch, key: (jnp.sum(params["w"] * 0) + 1, {})  # noqa: E731
    state = init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    run = jax.jit(lambda state: train_epoch(train_step(flat, optimizer), state, X, batch_size=2))
    state, _ = run(state)
    assert state.opt_state[1].scale < 1
    with jax.no_tracing():
        run(state)


@pytest.mark.parametrize("optimizer", [ADAM, optax.sgd(0.1), optax.adamw(0.1)])
def test_an_optimizer_that_does_not_ask_does_what_it_did(optimizer):
    def by_hand(state, batch):
        gradients = jax.grad(lambda p: loss(p, batch, state.key)[0])(state.params)
        updates, _ = optimizer.update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    state = init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    after, _ = jax.jit(train_step(loss, optimizer))(state, X)
    np.testing.assert_array_equal(after.params["w"], jax.jit(by_hand)(state, X)["w"])


@pytest.mark.parametrize("array", [np.array, jnp.array])
@pytest.mark.parametrize("index", [-1, 10])
def test_indices_out_of_range_are_refused(index, array):
    indices = array([[0, 1], [index, 9]])
    message = rf"of the 10 examples, integers in \[0, 10\), got {index}"
    with pytest.raises(ValueError, match=message):
        scan_batches(STEP, start(), X, indices)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda state: scan_batches(STEP, state, X, indices))(start())


def test_indices_may_be_known_or_traced_in_jit():
    indices = jnp.array([[0, 1], [8, 9]])
    traced = jax.jit(lambda state, rows: scan_batches(STEP, state, X, rows))(start(), indices)
    known = jax.jit(lambda state: scan_batches(STEP, state, X, indices))(start())
    np.testing.assert_array_equal(traced[1]["loss"], known[1]["loss"])


def test_an_epoch_of_a_known_state_may_be_traced():
    state = start()
    found, _ = jax.jit(lambda data: train_epoch(STEP, state, data, batch_size=5))(X)
    expected, _ = train_epoch(STEP, state, X, batch_size=5)
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=1e-6)


def test_an_epoch_does_not_begin_inside_of_another():
    state, _ = epoch_in_jit(STEP, start(), X, batch_size=5)
    with pytest.raises(ValueError, match="begins with an epoch of 3 steps, and step 2 is inside"):
        train_epoch(STEP, state, X, batch_size=4)


@pytest.mark.parametrize("batch_size", [3, 4])  # one example is left over, and two
def test_a_metric_of_every_example_is_refused_where_a_batch_is_smaller(batch_size):
    def each(params, batch, key):
        error = (batch @ params["w"] - 1) ** 2
        return error.mean(), {"each": error}

    step = train_step(each, OPTIMIZER)
    with pytest.raises(ValueError, match="same shape for every batch"):
        train_epoch(step, start(), X, batch_size=batch_size)


@pytest.mark.parametrize("made", [4, 2])
def test_metrics_must_have_room_for_every_step_of_the_epoch(made):
    state = start()
    metrics = empty_metrics(STEP, state, X, batch_size=made)
    used = 6 - made
    message = f"must have room for the {-(-10 // used)} steps of an epoch"
    with pytest.raises(ValueError, match=message):
        train_until(STEP, state, metrics, X, epoch_order(state, 0, 10), 2, batch_size=used)


@pytest.mark.parametrize("indices", [jnp.arange(8), jnp.zeros((2, 2)), jnp.array(3)])
def test_indices_are_integers_with_a_row_for_each_step(indices):
    with pytest.raises(ValueError, match=r"must be integers \[S, B\], a row for each step"):
        scan_batches(STEP, start(), X, indices)


def test_indices_may_be_lists():
    listed, _ = scan_batches(STEP, start(), X, [[0, 1], [8, 9]])
    known, _ = scan_batches(STEP, start(), X, jnp.array([[0, 1], [8, 9]]))
    np.testing.assert_array_equal(listed.params["w"], known.params["w"])


def test_a_batch_size_is_an_integer():
    with pytest.raises(ValueError, match="must be an integer between 1"):
        train_epoch(STEP, start(), X, batch_size=2.0)
