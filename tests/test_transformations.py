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
    O,
    T,
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


def differentiated(function):
    """Results, and gradients for cotangents of them by all that is not an integer."""

    def run(cotangents, shared, *given):
        results, pull = jax.vjp(function, shared, *given)
        return results, pull(cotangents)

    return run


def cotangents_for(function, shared, *many):
    """Numbers for the results of both examples."""

    def cosines(leaf):
        return np.cos(np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(cosines, jax.eval_shape(at_once(function), shared, *many))


def one_by_one(run, cotangents, shared, *many):
    """Results and gradients of both examples; those by what they share are added up."""
    many = jax.device_get(many)
    examples = [jax.tree.map(lambda a: a[i], (cotangents, many)) for i in range(2)]  # noqa: B023
    each = [jax.device_get(run(cotangent, shared, *one)) for cotangent, one in examples]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    results, (by_shared, *by_many) = stacked
    return results, (jax.tree.map(lambda a: a.sum(axis=0), by_shared), *by_many)


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
    return np.stack([logits_for(rule, seed) for seed in (2, 3)])


def given_to(rule):
    """Cotangents, nothing that is shared, and logits."""
    return cotangents_for(evidence(rule), {}, two_logits(rule)), {}, two_logits(rule)


@cache
def evidence_under_jit(rule):
    return one_by_one(jax.jit(differentiated(evidence(rule))), *given_to(rule))


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("transform", TRANSFORMATIONS)
def test_rules_and_losses(transform, rule):
    run = jax.jit(differentiated(TRANSFORMATIONS[transform](evidence(rule))))
    close(run(*given_to(rule)), evidence_under_jit(rule), rtol=1e-5)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_rules_and_losses_without_jit(rule):
    run = differentiated(evidence(rule))
    close(one_by_one(run, *given_to(rule)), evidence_under_jit(rule), rtol=1e-5)


def draws(rule):
    """Whether a rule draws noise, which is another in double precision."""
    return "key" in getattr(ALL_RULES[rule], "keywords", ())


@pytest.mark.parametrize("rule", [rule for rule in ALL_RULES if not draws(rule)])
def test_rules_and_losses_in_double_precision(rule):
    expected = evidence_under_jit(rule)
    with jax.enable_x64(True):
        logits = two_logits(rule).astype(np.float64)
        cotangents = cotangents_for(evidence(rule), {}, logits)
        got = jax.jit(differentiated(at_once(evidence(rule))))(cotangents, {}, logits)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}
        close(got, expected, rtol=1e-4)


def mixture(schedule):
    return partial(ALL_SCHEDULES[schedule], EXPERTS["mlp"].apply)


RULE_OF = dict(zip(SLOT_SCHEDULES, SLOT_RULES, strict=True))


@cache
def two_examples(schedule):
    """Cotangents, parameters, tokens and decisions."""
    params, x = problem("mlp")
    rule = RULE_OF.get(schedule, "top_2")
    decisions = jax.vmap(ALL_RULES[rule])(two_logits(rule))
    given = params, np.stack([x, np.sin(x)]), jax.device_get(decisions)
    return cotangents_for(mixture(schedule), *given), *given


@cache
def without_transformation(definition):
    return one_by_one(jax.jit(differentiated(mixture(definition))), *two_examples(definition))


def expected_of(schedule):
    return without_transformation(schedule if schedule in SLOT_SCHEDULES else "dense")


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
    close(run(*two_examples(schedule)), expected_of(schedule), rtol=1e-5)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_schedules_without_jit(schedule):
    run = differentiated(mixture(schedule))
    close(one_by_one(run, *two_examples(schedule)), expected_of(schedule), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_every_rule_and_schedule_trace_in_a_shard_map(schedule, rule):
    """What varies over the mesh is checked while tracing, so that nothing need be compiled."""

    def function(params, x, logits):
        return mixture(schedule)(params, x, RULES[rule](logits))

    params, x = problem("mlp")
    many = np.stack([x, x]), two_logits(rule)
    cotangent = np.ones((2, T, O), np.float32)
    run = differentiated(on_devices(function))
    y, gradients = jax.eval_shape(run, cotangent, params, *many)
    assert y.shape == cotangent.shape
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (params, *many))


def test_every_loss_is_in_the_table():
    offered = {name for name in moejax.__all__ if name.endswith("_loss")}
    assert offered == {loss.__name__ for losses in LOSSES.values() for loss in losses}
    kind = {name: type(jax.eval_shape(rule, logits_for(name))) for name, rule in ALL_RULES.items()}
    assert {kind[rule] for rule in LOSSES} == set(kind.values())
