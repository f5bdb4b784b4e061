"""A decision goes where its kind belongs; elsewhere it is refused by name, under `jit` too."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, params_of
from moejax.sharding import expert_parallel

D, E, T = 3, 4, 6
DECISIONS = {
    "Routing": lambda: moejax.top_k(normal(0, T, E), k=2),
    "ExpertChoice": lambda: moejax.expert_choice(normal(0, T, E), capacity=2),
    "SoftSlots": lambda: moejax.soft_slots(normal(0, T, E, 2)),
}
TOKEN_CHOICE = [
    moejax.load_balancing_loss,
    moejax.importance_loss,
    moejax.l1_loss,
    moejax.expert_load,
    moejax.dead_experts,
    moejax.gate_entropy,
    moejax.confidence,
    moejax.effective_experts,
    partial(moejax.expert_by_class, labels=np.zeros(T, np.int32), num_classes=2),
    partial(moejax.update_balance_bias, jax.device_put(np.zeros(E, np.float32)), rate=0.1),
    partial(moejax.update_l1_coefficient, jnp.float32(1), k=2),
    moejax.by_choice,
    moejax.by_token,
    moejax.by_token_weight,
    moejax.by_weight,
    moejax.positions,
    partial(moejax.limit_capacity, capacity=2),
    partial(moejax.capacity_for, factor=1.0),
    partial(moejax.mask_tokens, mask=np.ones(T, bool)),
]
READ_BY = {
    "Routing": [moejax.dense, moejax.dropless, partial(moejax.capacity, factor=1.0)],
    "ExpertChoice": [moejax.gather_slots],
    "SoftSlots": [moejax.mix_slots],
}


EXPERT = moejax.linear(D, 2)
PARAMS, X = params_of(moejax.stack(EXPERT, E)), normal(1, T, D)


@cache
def decision(kind):
    return DECISIONS[kind]()


def scheduled(schedule):
    return partial(schedule, EXPERT.apply, PARAMS, X)


READERS = [("Routing", reader) for reader in TOKEN_CHOICE] + [
    (kind, scheduled(one)) for kind, schedules in READ_BY.items() for one in schedules
]


@pytest.mark.parametrize("got", DECISIONS)
@pytest.mark.parametrize(("expected", "read"), READERS)
def test_a_decision_of_another_kind_is_refused(expected, read, got):
    if got == expected:
        jax.eval_shape(read, decision(got))
        return
    with pytest.raises(ValueError, match=f"takes a decision of type {expected}, got {got}, which"):
        jax.eval_shape(read, decision(got))


@pytest.mark.parametrize("loss", [moejax.entropy_loss, moejax.mutual_information_loss])
def test_losses_of_the_scores_alone_take_both_kinds_that_have_them(loss):
    assert np.isfinite(loss(decision("Routing")))
    assert np.isfinite(loss(decision("ExpertChoice")))
    with pytest.raises(ValueError, match="Routing or ExpertChoice, got SoftSlots"):
        loss(decision("SoftSlots"))


NARROW = {"uint8": 256, "int8": 128, "float32": 4, "bool": 1}


@pytest.mark.parametrize("dtype", NARROW)
def test_ids_that_cannot_say_nowhere_are_refused(dtype):
    """As a uint8, the 256 of a masked token would be expert 0."""
    num_experts = NARROW[dtype]
    scores, ids = np.eye(num_experts, dtype=np.float32), np.zeros((num_experts, 1))
    routing = moejax.Routing(ids.astype(dtype), scores[:, :1], scores, scores)
    mask = np.ones(num_experts, bool)
    readers = [
        moejax.load_balancing_loss,
        moejax.importance_loss,
        moejax.router_z_loss,
        moejax.expert_load,
        moejax.positions,
        partial(moejax.mask_tokens, mask=mask),
        *(
            partial(schedule, lambda p, x: x * p, jnp.ones(num_experts), jnp.ones((len(mask), 1)))
            for schedule in (moejax.dense, moejax.dropless, partial(moejax.capacity, factor=1.0))
        ),
        lambda routing: routing.counts,
        lambda routing: routing.gates,
        lambda routing: routing.present,
    ]
    for read in readers:
        with pytest.raises(ValueError, match=f"can hold the number of experts, {num_experts}"):
            jax.eval_shape(read, routing)
    wide = routing._replace(experts=ids.astype(np.uint16))
    counts = jax.jit(lambda routing: moejax.mask_tokens(routing, ~mask).counts)(wide)
    assert not np.any(counts)


def test_a_mesh_refuses_what_it_cannot_exchange():
    execute = expert_parallel(jax.make_mesh((1,), ("expert",)))
    with pytest.raises(ValueError, match="got ExpertChoice, which goes with `gather_slots`"):
        scheduled(execute)(decision("ExpertChoice"))


def test_counts_are_int32_in_double_precision(x64):
    logits = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    counts = jax.eval_shape(lambda logits: moejax.top_k(logits, k=2).counts, logits)
    assert counts.dtype == jnp.int32


@cache
def stacked(num_experts):
    return jax.vmap(partial(moejax.top_k, k=2))(normal(2, 3, T, num_experts))


@pytest.mark.parametrize("name", ["gates", "counts", "chooses"])
@pytest.mark.parametrize("num_experts", [4, 40])
def test_a_stack_of_decisions_is_not_pooled(name, num_experts):
    stack = stacked(num_experts)
    with pytest.raises(ValueError, match=r"for a stack use jax\.vmap"):
        getattr(stack, name)
    read = jax.jit(jax.vmap(lambda routing: getattr(routing, name)))
    alone = moejax.top_k(np.asarray(stack.logits)[1], k=2)
    np.testing.assert_array_equal(np.asarray(read(stack))[1], getattr(alone, name))
