"""Every rule, loss and schedule under every transformation: the same values and gradients.

Strict promotion of dtypes and ranks is on in all tests (see conftest.py), and what is said here of
one function holds inside another: two examples are mapped, one after the other, at once, or each on
a device of its own.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import (
    AUTO,
    EXPERTS,
    ONE_DEVICE,
    RULES,
    SCHEDULES,
    SLOT_RULES,
    SLOT_SCHEDULES,
    logits_for,
    problem,
)
from reference import close

MESH = jax.make_mesh((2,), ("data",), (AUTO,), devices=jax.devices()[:2])
ALL_RULES, ALL_SCHEDULES = RULES | SLOT_RULES, SCHEDULES | SLOT_SCHEDULES

OF_SCORES = [moejax.router_z_loss, moejax.entropy_loss, moejax.mutual_information_loss]
# A loss sees a decision and not the rule that made it: one rule of each kind of decision will do.
OF_ROUTING = [
    *OF_SCORES,
    moejax.load_balancing_loss,
    moejax.importance_loss,
    moejax.l1_loss,
]
LOSSES = {
    "softmax": OF_ROUTING,
    "noisy_top_2": [*OF_ROUTING, moejax.load_loss],
    "expert_choice": OF_SCORES,
    "soft_slots": [moejax.router_z_loss],
}


def one_by_one(function):
    def over(shared, *many):
        each = [function(shared, *jax.tree.map(lambda a: a[i], many)) for i in range(2)]  # noqa: B023
        return jax.tree.map(lambda *results: jnp.stack(results), *each)

    return over


def at_once(function):
    return lambda shared, *many: jax.vmap(partial(function, shared))(*many)


def scanned(function):
    def over(shared, *many):
        return jax.lax.scan(lambda _, one: ((), function(shared, *one)), (), many)[1]

    return over


def on_devices(function):
    """In a user's own `shard_map`, which checks what varies over the mesh."""

    def alone(shared, *block):
        result = function(shared, *jax.tree.map(lambda a: a[0], block))
        return jax.tree.map(lambda a: a[None], result)

    def over(shared, *many):
        blocks = [jax.P("data")] * len(many)
        run = jax.shard_map(alone, mesh=MESH, in_specs=(jax.P(), *blocks), out_specs=jax.P("data"))
        return run(shared, *many)

    return over


TRANSFORMATIONS = {
    "vmap": at_once,
    "scan": scanned,
    "remat": lambda function: scanned(jax.checkpoint(function)),
    "shard_map": on_devices,
}


def differentiated(mapped):
    """Results of both examples, and gradients of a scalar of them by all that is not an integer."""

    def scalar(shared, *many):
        results = mapped(shared, *many)
        totals = [jnp.sum(_weights(leaf) * leaf) for leaf in jax.tree.leaves(results)]
        return sum(totals[1:], start=totals[0]), results

    def run(shared, *many):
        places = tuple(range(len(many) + 1))
        return jax.value_and_grad(scalar, places, has_aux=True, allow_int=True)(shared, *many)

    return run


def _weights(leaf):
    return np.cos(np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)


def evidence(rule):
    """All that a rule's decision says: what it weighs, and every loss of decisions of its kind."""

    def function(shared, logits):
        decision = ALL_RULES[rule](logits)
        given = {name: leaf for name, leaf in decision._asdict().items() if leaf is not None}
        floats = {k: v for k, v in given.items() if jnp.issubdtype(v.dtype, jnp.inexact)}
        return floats | {one.__name__: one(decision) for one in LOSSES.get(rule, ())}

    return function


@cache
def two_logits(rule):
    return jax.device_put(np.stack([logits_for(rule, seed) for seed in (2, 3)]))


@cache
def evidence_under_jit(rule):
    return jax.jit(differentiated(one_by_one(evidence(rule))))({}, two_logits(rule))


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("transform", TRANSFORMATIONS)
def test_rules_and_losses(transform, rule):
    run = jax.jit(differentiated(TRANSFORMATIONS[transform](evidence(rule))))
    close(run({}, two_logits(rule)), evidence_under_jit(rule), rtol=1e-5)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_rules_and_losses_without_jit(rule):
    run = differentiated(one_by_one(evidence(rule)))
    close(run({}, two_logits(rule)), evidence_under_jit(rule), rtol=1e-5)


def draws(rule):
    """Whether a rule draws noise, which is another in double precision."""
    return "key" in getattr(ALL_RULES[rule], "keywords", ())


@pytest.mark.parametrize("rule", [rule for rule in ALL_RULES if not draws(rule)])
def test_rules_and_losses_in_double_precision(rule):
    expected = evidence_under_jit(rule)
    with jax.enable_x64(True):
        logits = two_logits(rule).astype(jnp.float64)
        got = jax.jit(differentiated(at_once(evidence(rule))))({}, logits)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}
        close(got, expected, rtol=1e-4)


def mixture(schedule):
    return partial(ALL_SCHEDULES[schedule], EXPERTS["mlp"].apply)


RULE_OF = dict(zip(SLOT_SCHEDULES, SLOT_RULES, strict=True))


@cache
def two_examples(schedule):
    params, x = problem("mlp")
    rule = ALL_RULES[RULE_OF.get(schedule, "top_2")]
    decisions = jax.vmap(rule)(two_logits(RULE_OF.get(schedule, "top_2")))
    return params, jnp.stack([x, jnp.sin(x)]), decisions


@cache
def without_transformation(schedule):
    definition = schedule if schedule in SLOT_SCHEDULES else "dense"
    return jax.jit(differentiated(one_by_one(mixture(definition))))(*two_examples(schedule))


# A schedule that is itself a `shard_map` goes into no other.
OF_SCHEDULES = [
    (transform, schedule)
    for transform in TRANSFORMATIONS
    for schedule in ALL_SCHEDULES
    if (transform, schedule) != ("shard_map", "expert_parallel")
]


@pytest.mark.parametrize(("transform", "schedule"), OF_SCHEDULES)
def test_schedules(transform, schedule):
    run = jax.jit(differentiated(TRANSFORMATIONS[transform](mixture(schedule))))
    close(run(*two_examples(schedule)), without_transformation(schedule), rtol=1e-5)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_schedules_without_jit(schedule):
    run = differentiated(one_by_one(mixture(schedule)))
    close(run(*two_examples(schedule)), without_transformation(schedule), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_every_rule_and_schedule_trace_in_a_shard_map(schedule, rule):
    """What varies over the mesh is checked while tracing, so that nothing need be compiled."""

    def function(params, x, logits):
        return mixture(schedule)(params, x, RULES[rule](logits))

    params, x = problem("mlp")
    many = jnp.stack([x, x]), two_logits(rule)
    (_, y), gradients = jax.eval_shape(differentiated(on_devices(function)), params, *many)
    assert y.shape[:2] == (2, len(x))
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (params, *many))


def test_every_loss_is_in_the_table():
    offered = {name for name in moejax.__all__ if name.endswith("_loss")}
    assert offered == {loss.__name__ for losses in LOSSES.values() for loss in losses}
    kind = {name: type(jax.eval_shape(rule, logits_for(name))) for name, rule in ALL_RULES.items()}
    assert {kind[rule] for rule in LOSSES} == set(kind.values())
