"""Expert choice and Soft MoE: published numbers, masks, and `moe`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import moejax
from cases import EXPERTS, C, D, E, T, normal, params_of
from reference import check_gradients, golden

EXPERT = EXPERTS["mlp"]
X = normal(1, T, D)
LOGITS, SLOT_LOGITS = normal(2, T, E, scale=2), normal(3, T, E, C, scale=2)


KINDS = ["expert_choice", "soft"]


def test_expert_choice_is_that_of_vmoe():
    peer = golden("vmoe_expert_choice_capacity_4")
    decision = moejax.expert_choice(jnp.asarray(peer["logits"]), capacity=4)
    combine = np.zeros((24, 8))
    for e, (tokens, weights) in enumerate(zip(*jax.device_get(decision)[:2], strict=True)):
        combine[tokens, e] = weights
    np.testing.assert_allclose(combine, peer["combine"].sum(-1), rtol=1e-6)


def test_soft_slots_are_those_of_vmoe():
    peer = golden("vmoe_soft_moe")
    slots = peer["mu"].transpose(1, 2, 0)  # [D, E, C] -> [E, C, D]
    params = {"slots": jnp.asarray(slots), "scale": np.float32(peer["scale"])}
    router = moejax.slots(6, 3, 2)
    decide = jax.vmap(lambda x: moejax.soft_slots(router.apply(params, x)))
    decision = jax.jit(decide)(peer["x"])
    np.testing.assert_allclose(decision.dispatch, peer["dispatch"], rtol=2e-6)
    np.testing.assert_allclose(decision.combine, peer["combine"], rtol=2e-6)


def test_soft_gradients_in_float64(x64):
    rng = np.random.default_rng(0)
    router = moejax.slots(4, 2, 2)
    params = jax.tree.map(np.float64, params_of(router))

    def output(params, experts, x):
        decision = moejax.soft_slots(router.apply(params, x))
        return moejax.mix_slots(lambda w, x: jnp.tanh(x @ w), experts, x, decision)

    check_gradients(output, params, rng.normal(size=(2, 4, 3)), rng.normal(size=(5, 4)))


def model(kind):
    if kind == "soft":
        route, execute, router = moejax.soft_slots, moejax.mix_slots, moejax.slots(D, E, C)
    else:
        route = partial(moejax.expert_choice, capacity=C)
        execute, router = moejax.gather_slots, moejax.linear(D, E)
    return moejax.moe(EXPERT, router, num_experts=E, route=route, execute=execute)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_change_nothing(kind):
    layer = model(kind)
    params = params_of(layer)
    mask = np.array([True, True, False, True, False, True, True, True])
    apply, x = jax.jit(layer.apply), np.asarray(X)
    y = np.asarray(apply(params, x, mask=mask)[0])
    others, _ = apply(params, np.where(mask[:, None], x, np.float32(1e6)), mask=mask)
    np.testing.assert_array_equal(y, others)
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_allclose(y[mask], apply(params, x[mask])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_padding_gives_zeros(kind):
    layer = model(kind)
    params = params_of(layer)
    total = lambda params: layer.apply(params, X, mask=jnp.zeros(T, bool))[0].sum()  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert float(value) == 0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_a_number_spoils_no_other(kind):
    layer = model(kind)
    params = params_of(layer)
    others, apply = np.arange(T) != 2, jax.jit(layer.apply)
    y, _ = apply(params, np.where(others[:, None], X, np.float32(np.nan)))
    expected, _ = apply(params, X, mask=others)
    np.testing.assert_array_equal(np.asarray(y)[others], np.asarray(expected)[others])


def test_experts_take_their_capacity_and_no_token_twice():
    decision = moejax.expert_choice(LOGITS, capacity=C)
    for tokens in decision.tokens.tolist():
        assert len(set(tokens)) == C


def test_ties_go_to_the_first_token():
    decision = moejax.expert_choice(jnp.zeros((T, E)), capacity=2)
    np.testing.assert_array_equal(decision.tokens, [[0, 1]] * E)


def test_underflowing_scores_do_not_tie():
    logits = jnp.array([[-500.0, 0], [-400, 0], [-300, 0]])
    np.testing.assert_array_equal(moejax.expert_choice(logits, capacity=1).tokens[0], [2])


def test_z_loss_of_expert_choice_leaves_padding_out():
    decision = moejax.expert_choice(LOGITS, capacity=C, mask=np.arange(T) < 4)
    expected = np.mean(logsumexp(np.asarray(LOGITS)[:4], axis=-1) ** 2)
    np.testing.assert_allclose(moejax.router_z_loss(decision), expected, rtol=1e-6)


def test_z_loss_of_soft_slots_is_a_scalar():
    """All slots of all experts share one softmax."""
    expected = logsumexp(np.reshape(SLOT_LOGITS, (T, -1)), axis=-1)[:4] ** 2
    decision = moejax.soft_slots(SLOT_LOGITS, mask=np.arange(T) < 4)
    np.testing.assert_allclose(moejax.router_z_loss(decision), expected.mean(), rtol=1e-6)


COLUMN = jnp.ones((T, 1), bool)  # would broadcast against the tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moejax.expert_choice(LOGITS, capacity=T + 1), "number of tokens"),
        (lambda: moejax.expert_choice(LOGITS, capacity=0), "number of tokens"),
        (lambda: moejax.expert_choice(LOGITS, capacity=1.5), "an integer"),
        (lambda: moejax.soft_slots(LOGITS), "tokens, experts, slots"),
        (lambda: moejax.soft_slots(LOGITS[..., None], mask=COLUMN), "`mask` must be"),
        (lambda: moejax.expert_choice(LOGITS, capacity=1, mask=COLUMN), "`mask` must be"),
    ],
)
def test_useless_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_token_that_is_not_a_number_is_left_out_with_and_without_a_mask():
    logits = SLOT_LOGITS.at[1].set(jnp.nan)
    alone = moejax.soft_slots(logits)
    masked = moejax.soft_slots(logits, mask=jnp.ones(len(logits), bool))
    for found, expected in zip(masked[:2], alone[:2], strict=True):
        np.testing.assert_array_equal(found, expected)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["expert_choice", "soft_slots"])
def test_an_expert_must_return_one_output_for_each_slot(kind):
    params, x = np.ones((E, D, C), np.float32), np.ones((T, D), np.float32)
    if kind == "expert_choice":
        decision, schedule = moejax.expert_choice(LOGITS, capacity=C), moejax.gather_slots
    else:
        decision, schedule = moejax.soft_slots(SLOT_LOGITS), moejax.mix_slots

    def run(expert):
        return jax.eval_shape(partial(schedule, expert), params, x, decision)

    with pytest.raises(ValueError, match="one output per token"):
        run(lambda p, x: (x @ p).sum(axis=0)[: C - 1])
    with pytest.raises(ValueError, match="wrap a mixture in `outputs_of`"):
        run(lambda p, x: (x @ p, None))


def test_an_expert_without_tokens_leaves_every_gradient_finite():
    logits = np.where(np.arange(E) == 1, np.float32(-np.inf), LOGITS)
    params = np.where(np.arange(E) == 1, np.float32(np.inf), 1)[:, None]
    expert = lambda params, x: jnp.exp(params[None] * x)  # noqa: E731

    def loss(logits, x):
        decision = moejax.expert_choice(logits, capacity=C)
        return moejax.gather_slots(expert, params, x, decision).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = run(logits, jnp.ones((T, 1)))
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.any(gradients[0])
