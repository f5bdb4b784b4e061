"""Losses against published numbers, hand-worked ones, and float64 finite differences."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal
from moejax.rules.noisy import choose_noisy
from reference import check_gradients, golden

GATES = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


@jax.jit
def one_choice(scores):
    """Token t goes to the expert with its largest score; weights are that score."""
    experts = jnp.argmax(scores, axis=-1)[:, None]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    return moejax.Routing(experts, weights, scores, jnp.log(scores))


@jax.jit
def every_choice(gates):
    experts = jnp.broadcast_to(jnp.arange(gates.shape[1]), gates.shape)
    return moejax.Routing(experts, gates, gates, jnp.log(gates))


def test_hand_worked():
    np.testing.assert_allclose(
        moejax.load_balancing_loss(one_choice(GATES)), 3 * (2 * 0.425 + 0 + 2 * 0.3) / 4, rtol=1e-6
    )
    np.testing.assert_allclose(moejax.load_balancing_loss(one_choice(GATES)), 1.0875, rtol=1e-6)
    np.testing.assert_allclose(moejax.importance_loss(every_choice(GATES)), 0.03874999, rtol=1e-6)


def test_vmoe_losses():
    peer = golden("vmoe_losses")
    logits = jnp.asarray(peer["logits"])
    balance = lambda logits: moejax.load_balancing_loss(moejax.switch(logits))  # noqa: E731
    importance = lambda logits: moejax.importance_loss(moejax.softmax(logits))  # noqa: E731
    for loss, name in [(balance, "gshard"), (importance, "importance")]:
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
        np.testing.assert_allclose(value, peer[name], rtol=1e-5)
        np.testing.assert_allclose(gradient, peer[f"grad_{name}"], rtol=1e-4, atol=1e-8)


def test_praxis_balance_loss():
    peer = golden("praxis_top_2_capacity_4")
    loss = moejax.load_balancing_loss(moejax.switch(jnp.asarray(peer["logits"])))
    np.testing.assert_allclose(loss, peer["aux"], rtol=1e-6)


def test_flaxformer_losses():
    peer = golden("flaxformer_losses")
    routing = moejax.top_k(jnp.asarray(peer["logits"][0]), k=2, renormalize=False)
    np.testing.assert_allclose(2 * moejax.load_balancing_loss(routing), peer["lbl"], rtol=1e-6)
    np.testing.assert_allclose(moejax.router_z_loss(routing), peer["z"], rtol=1e-6)


def test_shazeer_losses():
    peer = golden("shazeer_noisy_top_2")
    clean, noise, scale = (peer[name] for name in ("logits", "noise", "noise_std"))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_losses(clean):
        routing = choose_noisy(clean, clean + noise * scale, jnp.asarray(scale), k=2)
        losses = moejax.importance_loss(routing), moejax.load_loss(routing)
        return sum(losses), losses

    gradient, (importance, load) = gradient_and_losses(clean)
    np.testing.assert_allclose(importance, peer["cv_importance"], rtol=1e-5)
    np.testing.assert_allclose(load, peer["cv_load"], rtol=1e-5)
    np.testing.assert_allclose(gradient, peer["grad_logits_of_sum"], rtol=1e-4, atol=1e-7)


ROUTES = {
    "softmax": moejax.softmax,
    "top_2": partial(moejax.top_k, k=2),
    "switch": moejax.switch,
    "sigmoid_top_2": partial(moejax.sigmoid_top_k, k=2),
    "relu": moejax.relu,
    "noisy_top_2": partial(moejax.noisy_top_k, noise_scale=0.7, k=2, key=jax.random.key(0)),
}
LOSSES = {
    "load_balancing": moejax.load_balancing_loss,
    "importance": moejax.importance_loss,
    "z": moejax.router_z_loss,
    "entropy": moejax.entropy_loss,
    "mutual_information": moejax.mutual_information_loss,
    "l1": moejax.l1_loss,
}


@cache
def all_losses(route):
    """All of them at once, as one vector: one compilation per rule."""

    @jax.jit
    def losses(logits):
        routing = ROUTES[route](logits)
        return jnp.stack([loss(routing) for loss in LOSSES.values()])

    return losses


@cache
def losses_and_gradients(route):
    """Compiled for one shape."""

    @jax.jit
    def run(logits):
        losses, pull = jax.vjp(all_losses(route), logits)
        return losses, jax.vmap(pull)(np.eye(len(LOSSES), dtype=logits.dtype))

    return run


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_in_float64(route, x64):
    check_gradients(all_losses(route), np.random.default_rng(0).normal(size=(7, 4)))


def test_load_loss_gradients_in_float64(x64):
    rng = np.random.default_rng(0)
    route = partial(moejax.noisy_top_k, k=2, key=jax.random.key(0))
    loss = lambda logits, scale: moejax.load_loss(route(logits, scale))  # noqa: E731
    check_gradients(loss, rng.normal(size=(7, 4)), rng.uniform(0.5, 2, (7, 4)))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_balance_is_one_for_every_k(k):
    logits = jnp.array([np.roll([4.0, 3, 2, 1], shift) for shift in range(4)])
    routing = moejax.top_k(logits, k=k)
    np.testing.assert_allclose(moejax.load_balancing_loss(routing), 1, rtol=1e-6)


def test_collapse_costs_experts_over_k():
    logits = jnp.broadcast_to(jnp.array([60.0, 0, 0, 0]), (8, 4))
    np.testing.assert_allclose(moejax.load_balancing_loss(moejax.switch(logits)), 4, rtol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_finite_at_exact_balance(route):
    """Where a router that starts at zero is at its first step."""
    _, gradients = losses_and_gradients(route)(np.zeros((3, 4), np.float32))
    assert np.isfinite(gradients).all()


def test_gradient_of_load_is_finite_at_exact_balance():
    loss = lambda logits: moejax.load_loss(ROUTES["noisy_top_2"](logits))  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(np.zeros((8, 4), np.float32))).all()


@pytest.mark.parametrize("route", ROUTES)
def test_losses_are_finite_at_extreme_logits(route):
    logits = np.float32([[1e4, -1e4, 0, 0], [0, 0, 0, 1e4], [-1e4, -1e4, -1e4, -1e4]])
    for values in losses_and_gradients(route)(logits):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("loss", [*LOSSES, "load"])
def test_masked_tokens_enter_no_loss(loss):
    scalar = {**LOSSES, "load": moejax.load_loss}[loss]
    logits, mask = np.asarray(normal(0, 9, 4)), np.arange(9) < 6
    route = partial(moejax.noisy_top_k, noise_scale=0.5, k=2)
    masked = jax.jit(moejax.mask_tokens)
    with_padding = scalar(masked(route(logits), mask))
    np.testing.assert_allclose(with_padding, scalar(route(logits[:6])), rtol=1e-6)
    assert np.isfinite(scalar(masked(route(logits), np.zeros(9, bool))))


def test_load_loss_needs_noise():
    with pytest.raises(ValueError, match="noisy_top_k"):
        moejax.load_loss(moejax.top_k(jnp.zeros((2, 4)), k=2))


def test_entropies_by_hand():
    p = np.asarray(GATES, np.float64)
    mean_entropy = np.mean([-sum(v * np.log(v) for v in row if v > 0) for row in p])
    mean = p.mean(0)
    routing = every_choice(GATES)
    np.testing.assert_allclose(moejax.entropy_loss(routing), mean_entropy, rtol=1e-6)
    np.testing.assert_allclose(
        moejax.mutual_information_loss(routing),
        mean_entropy + np.sum(mean * np.log(mean)),
        rtol=1e-5,
    )


def test_balance_loss_of_relu_weights_gates_by_load():
    logits = normal(2, 8, 4)
    gates = np.maximum(np.asarray(logits), 0)
    assert (gates > 0).any(axis=1).all()
    load = (gates > 0).sum(0) / (gates > 0).sum()
    np.testing.assert_allclose(
        moejax.load_balancing_loss(moejax.relu(logits)), 4 * np.mean(gates @ load), rtol=1e-6
    )


STACKED = {
    "routing": (jax.vmap(partial(moejax.top_k, k=2)), (3, 5, 4), moejax.load_balancing_loss),
    "diagnosed": (jax.vmap(moejax.switch), (3, 5, 4), moejax.dead_experts),
    "expert choice": (
        jax.vmap(partial(moejax.expert_choice, capacity=2)),
        (3, 5, 4),
        moejax.router_z_loss,
    ),
    "soft slots": (jax.vmap(moejax.soft_slots), (3, 5, 4, 1), moejax.router_z_loss),
}


@pytest.mark.parametrize("case", STACKED)
def test_a_stack_of_decisions_is_refused_and_vmap_takes_it(case):
    rule, shape, loss = STACKED[case]
    stack = rule(normal(0, *shape))
    with pytest.raises(ValueError, match=rf"use jax.vmap\({loss.__name__}\)"):
        loss(stack)
    assert jax.vmap(loss)(stack).shape == (3,)


def test_z_loss_passes_no_gradient_to_a_token_without_an_expert():
    logits = np.float32([[1.0, 2.0], [-np.inf, -np.inf], [3.0, 0.0]])

    def loss(logits):
        return moejax.router_z_loss(moejax.expert_choice(logits, capacity=1))

    value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(logits))
    np.testing.assert_allclose(value, jnp.mean(jax.nn.logsumexp(logits[::2], axis=-1) ** 2))
    assert np.isfinite(gradient).all()
    assert gradient[0].all()
