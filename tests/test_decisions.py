"""A decision goes where its kind belongs; elsewhere it is refused by name, under `jit` too."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import moejax
from moejax.sharding import expert_parallel

D, E, T = 3, 4, 6
LOGITS = jax.random.normal(jax.random.key(0), (T, E))
DECISIONS = {
    "Routing": moejax.top_k(LOGITS, k=2),
    "ExpertChoice": moejax.expert_choice(LOGITS, capacity=2),
    "SoftSlots": moejax.soft_slots(jnp.stack([LOGITS, -LOGITS], axis=-1)),
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
    partial(moejax.expert_by_class, labels=jnp.zeros(T, jnp.int32), num_classes=2),
    partial(moejax.update_balance_bias, jnp.zeros(E), rate=0.1),
    partial(moejax.update_l1_coefficient, jnp.float32(1), k=2),
    moejax.by_choice,
    moejax.by_token,
    moejax.by_token_weight,
    moejax.by_weight,
    moejax.positions,
    partial(moejax.limit_capacity, capacity=2),
    partial(moejax.capacity_for, factor=1.0),
    partial(moejax.mask_tokens, mask=jnp.ones(T, bool)),
]
READ_BY = {
    "Routing": [moejax.dense, moejax.dropless, partial(moejax.capacity, factor=1.0)],
    "ExpertChoice": [moejax.gather_slots],
    "SoftSlots": [moejax.mix_slots],
}


def scheduled(schedule):
    expert = moejax.linear(D, 2)
    params, x = moejax.stack(expert, E).init(jax.random.key(1)), jnp.ones((T, D))
    return partial(schedule, expert.apply, params, x)


READERS = [("Routing", reader) for reader in TOKEN_CHOICE] + [
    (kind, scheduled(one)) for kind, schedules in READ_BY.items() for one in schedules
]


@pytest.mark.parametrize("got", DECISIONS)
@pytest.mark.parametrize(("expected", "read"), READERS)
def test_a_decision_of_another_kind_is_refused(expected, read, got):
    if got == expected:
        read(DECISIONS[got])
        return
    with pytest.raises(ValueError, match=f"takes a decision of type {expected}, got {got}, which"):
        jax.jit(read)(DECISIONS[got])


@pytest.mark.parametrize("loss", [moejax.entropy_loss, moejax.mutual_information_loss])
def test_losses_of_the_scores_alone_take_both_kinds_that_have_them(loss):
    assert jnp.isfinite(loss(DECISIONS["Routing"]))
    assert jnp.isfinite(loss(DECISIONS["ExpertChoice"]))
    with pytest.raises(ValueError, match="Routing or ExpertChoice, got SoftSlots"):
        loss(DECISIONS["SoftSlots"])


NARROW = {"uint8": 256, "int8": 128, "float32": 4, "bool": 1}


@pytest.mark.parametrize("dtype", NARROW)
def test_ids_that_cannot_say_nowhere_are_refused(dtype):
    """As a uint8, the 256 of a masked token would be expert 0."""
    num_experts = NARROW[dtype]
    logits = jnp.eye(num_experts)
    routing = moejax.switch(logits)._replace(experts=jnp.zeros((num_experts, 1), dtype))
    mask = jnp.ones(num_experts, bool)
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
    wide = routing._replace(experts=jnp.zeros((num_experts, 1), jnp.uint16))
    assert moejax.mask_tokens(wide, ~mask).counts.sum() == 0


def test_a_mesh_refuses_what_it_cannot_exchange():
    execute = expert_parallel(jax.make_mesh((1,), ("expert",)))
    with pytest.raises(ValueError, match="got ExpertChoice, which goes with `gather_slots`"):
        scheduled(execute)(DECISIONS["ExpertChoice"])


def test_counts_are_int32_in_double_precision(x64):
    assert moejax.top_k(jnp.ones((3, 4)), k=2).counts.dtype == jnp.int32


@pytest.mark.parametrize("name", ["gates", "counts", "chooses"])
@pytest.mark.parametrize("num_experts", [4, 40])
def test_a_stack_of_decisions_is_not_pooled(name, num_experts):
    logits = jax.random.normal(jax.random.key(2), (3, T, num_experts))
    stack = jax.vmap(partial(moejax.top_k, k=2))(logits)
    with pytest.raises(ValueError, match=r"for a stack use jax\.vmap"):
        getattr(stack, name)
    apart = jax.vmap(lambda routing: getattr(routing, name))(stack)
    alone = getattr(moejax.top_k(logits[1], k=2), name)
    assert jnp.array_equal(apart[1], alone)
