"""`jax.export` with a symbolic number of tokens: one program for every T."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import moejax
from cases import RULES, D, E, O, normal, params_of

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
(T,) = export.symbolic_shape("T", constraints=["T >= 2"])
B, S = export.symbolic_shape("B, S")  # of another function, so of a scope of their own
LOSSES = [
    moejax.load_balancing_loss,
    moejax.importance_loss,
    moejax.router_z_loss,
    moejax.entropy_loss,
    moejax.mutual_information_loss,
    moejax.l1_loss,
    moejax.confidence,
    moejax.effective_experts,
    moejax.dead_experts,
    lambda routing: moejax.load_loss(routing) if routing.chances is not None else jnp.zeros(()),
    moejax.positions,
    partial(moejax.limit_capacity, capacity=2, priority=moejax.by_token),
    partial(moejax.limit_capacity, capacity=2, priority=moejax.by_token_weight),
]


# A loss sees a decision and not its rule: K = E, fewer choices, some that go nowhere, chances.
WITH_LOSSES = {"softmax", "top_2", "top_p_3", "noisy_top_2"}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def exported(function, *args):
    return export.export(jax.jit(function), platforms=["cpu"])(*args).call


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"hashed"}))
def test_rules_and_losses(rule):
    def evidence(logits):
        routing = RULES[rule](logits)
        return routing, [loss(routing) for loss in LOSSES if rule in WITH_LOSSES]

    call = exported(evidence, floats(T, E))
    if "key" in getattr(RULES[rule], "keywords", {}):
        return  # as random for a symbolic T, but not the same numbers

    @jax.jit
    def both(*batches):
        return [(call(logits), evidence(logits)) for logits in batches]

    for found, expected in both(normal(2, 2, E), normal(7, 7, E)):
        jax.tree.map(close, found, expected)


def test_tables_masks_labels_and_targets():
    def everything(logits, ids, mask):
        routing = moejax.mask_tokens(moejax.top_k(logits, k=2), mask)
        hashed = moejax.hashed(logits, token_ids=ids, table=jnp.arange(10) % E)
        taken = moejax.expert_choice(logits, capacity=2, mask=mask)
        slots = moejax.soft_slots(jnp.stack([logits, logits], axis=-1), mask=mask)
        table = moejax.expert_by_class(routing, ids, 3)
        gates = jax.nn.log_softmax(logits)
        likelihood = moejax.categorical_log_likelihood(jnp.stack([logits] * E), ids)
        loss = moejax.mixture_nll(gates, likelihood, mask=mask)
        return hashed, taken, slots, table, loss

    ids = jax.ShapeDtypeStruct((T,), jnp.int32)
    call = exported(everything, floats(T, E), ids, jax.ShapeDtypeStruct((T,), bool))
    args = normal(0, 5, E), jnp.arange(5) % 3, jnp.arange(5) > 0
    jax.tree.map(close, call(*args), jax.jit(everything)(*args))


@pytest.mark.parametrize(
    ("rule", "execute"),
    [("softmax", moejax.dense), ("top_2", moejax.dense), ("top_2", moejax.dropless)],
)
def test_the_layer_on_sequences_of_any_length(rule, execute):
    layer = moejax.with_shared(
        moejax.moe(
            moejax.mlp(D, 5, O),
            moejax.linear(D, E),
            num_experts=E,
            route=RULES[rule],
            execute=execute,
        ),
        moejax.linear(D, O),
    )
    params = params_of(layer)
    apply = lambda params, x: layer.apply(params, x)[0]  # noqa: E731
    call = exported(apply, params, floats(B, S, D))
    x = normal(0, 2, 3, D)
    close(call(params, x), apply(params, x))


def by_number_of_slots(routing):
    return moejax.limit_capacity(routing, capacity=moejax.capacity_for(routing, factor=1.0))


def by_schedule(routing):
    x = jnp.ones((routing.experts.shape[0], D))
    return moejax.capacity(jnp.multiply, jnp.ones((E, D)), x, routing, factor=1.0)


@pytest.mark.parametrize("limited", [by_number_of_slots, by_schedule])
def test_a_capacity_made_of_an_unknown_number_of_tokens_is_refused(limited):
    with pytest.raises(ValueError, match="`capacity_for` needs a known number of tokens"):
        exported(lambda logits: limited(moejax.top_k(logits, k=2)), floats(T, E))
