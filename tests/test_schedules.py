"""One table: every schedule x rule x expert x dtype against the obvious loop, value and gradient.

A schedule is compiled once per expert, dtype, and kind and shape of a decision, which is an
argument. One expert meets decisions of two shapes; for the others every decision has room for E
choices. All schedules but `dense`, which alone looks at the kind of a `Routing`, meet one kind.
"""

import inspect
import pkgutil
import re
from functools import cache, partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import (
    DTYPES,
    EXPERTS,
    PAIRS,
    RULES,
    SCHEDULES,
    SLOT_RULES,
    SLOT_SCHEDULES,
    D,
    E,
    T,
    logits_for,
    problem,
)
from reference import close, obvious, obvious_gradients

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}  # bfloat16 has 8 bits: 2^-8 per operation
ALL_RULES, ALL_SCHEDULES = RULES | SLOT_RULES, SCHEDULES | SLOT_SCHEDULES


def cosines(y):
    """By what an output is multiplied, so that the sum of it is a scalar to differentiate."""
    return np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype)


def gradients_and_output(schedule, expert):
    """The gradients by parameters, tokens and whatever a decision holds, and the output."""

    def scalar(params, x, decision):
        y = schedule(expert, params, x, decision)
        return jnp.sum(cosines(y) * y, dtype=np.promote_types(y.dtype, jnp.float32)), y

    return jax.grad(scalar, argnums=(0, 1, 2), has_aux=True, allow_int=True)


def by_the_loop(expert):
    def run(params, x, decision):
        y = obvious(expert, params, x, decision)
        return obvious_gradients(expert, params, x, decision, cosines(y)), y

    return run


@cache
def decide(rule, dtype=jnp.float32):
    """The decision, and the function that takes its cotangent to the logits'."""

    def evidence(logits):
        decision = ALL_RULES[rule](logits)
        routed = isinstance(decision, moejax.Routing)
        return decision._replace(chances=None) if routed else decision

    decision, to_logits = jax.vjp(jax.jit(evidence), logits_for(rule).astype(dtype))
    return jax.device_get(decision), jax.jit(to_logits)


def with_choices(decision, least):
    """A decision with K = least or K = E: choices are added that go nowhere, and shapes agree."""
    if not isinstance(decision, moejax.Routing):
        return decision
    k = decision.experts.shape[1]
    missing = ((0, 0), (0, (least if k <= least else E) - k))
    experts = np.pad(decision.experts, missing, constant_values=E)
    return decision._replace(experts=experts, weights=np.pad(decision.weights, missing))


def alike(schedule, least, decision):
    """The decision in one of the few kinds and shapes that the schedule is compiled for."""
    decision = with_choices(decision, least)
    plain = isinstance(decision, moejax.Routing) and schedule != "dense"
    return moejax.Routing(*decision) if plain else decision


def cotangent_of(decision, cotangent):
    """A cotangent of the decision's kind, without the choices that were added."""
    if not isinstance(decision, moejax.Routing):
        return cotangent
    k = decision.experts.shape[1]
    experts, weights = cotangent.experts[:, :k], cotangent.weights[:, :k]
    return type(decision)(*cotangent)._replace(experts=experts, weights=weights)


def evaluate(run, rule, params, x, prepare=partial(with_choices, least=E)):  # noqa: B008
    """The output, and the gradients by parameters, tokens and logits."""
    decision, to_logits = decide(rule, x.dtype if x.dtype == jnp.float64 else jnp.float32)
    (params, x, cotangent), y = jax.device_get(run(params, x, prepare(decision)))
    return y, params, x, to_logits(cotangent_of(decision, cotangent))


@cache
def compiled(schedule, expert):
    return jax.jit(gradients_and_output(ALL_SCHEDULES[schedule], EXPERTS[expert].apply))


@cache
def expected(rule, expert, dtype):
    """By the loop, in float32 at the least, on tokens rounded to the dtype."""
    params, x = problem(expert, dtype)
    run = by_the_loop(EXPERTS[expert].apply)
    return evaluate(run, rule, params, x.astype(np.promote_types(dtype, jnp.float32)))


@pytest.mark.parametrize(("schedule", "rule"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expert", ["mlp", "glu", "pixelwise"])
def test_a_schedule_computes_the_sum(expert, dtype, schedule, rule):
    params, x = problem(expert, DTYPES[dtype])
    prepare = partial(alike, schedule, 2 if expert == "mlp" else E)
    got = evaluate(compiled(schedule, expert), rule, params, x, prepare)
    assert got[0].dtype == DTYPES[dtype]
    tolerance = TOLERANCE[dtype]
    close(got, expected(rule, expert, DTYPES[dtype]), rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize(("schedule", "rule"), PAIRS)
def test_a_schedule_computes_the_sum_in_double_precision(schedule, rule, x64):
    params, x = problem("mlp", jnp.float64)
    got = evaluate(compiled(schedule, "mlp"), rule, params, x, partial(alike, schedule, E))
    assert got[0].dtype == jnp.float64
    run = by_the_loop(EXPERTS["mlp"].apply)
    close(got, evaluate(run, rule, params, x), rtol=1e-12)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "dense"])
def test_no_schedule_but_dense_looks_at_the_kind_of_a_routing(schedule):
    function = gradients_and_output(SCHEDULES[schedule], EXPERTS["mlp"].apply)
    decision, _ = decide("softmax")
    assert isinstance(decision, moejax.DenseRouting)
    of_each_kind, of_any = (
        str(jax.make_jaxpr(function)(*problem("mlp"), given))
        for given in (decision, moejax.Routing(*decision))
    )
    assert of_each_kind == of_any


@pytest.mark.parametrize(
    ("schedule", "rule"), [(name, "top_2") for name in SCHEDULES] + PAIRS[-len(SLOT_RULES) :]
)
def test_images_go_through_the_layer(schedule, rule, key):
    """With `feature_ndim=3` the leading axes are tokens, whatever an expert makes of an image."""
    expert, inner = EXPERTS["pixelwise"], moejax.linear(D, E)
    slots = moejax.slots(D, E, 3)
    of_pixel = slots if rule == "soft_slots" else inner
    router = moejax.Layer(of_pixel.init, lambda p, x: of_pixel.apply(p, x[:, 0, 0]))
    model = moejax.moe(
        expert,
        router,
        num_experts=E,
        route=ALL_RULES[rule],
        execute=ALL_SCHEDULES[schedule],
        feature_ndim=3,
    )
    params, (_, x) = model.init(key), problem("pixelwise")
    y, decision = jax.jit(model.apply)(params, x.reshape(2, T // 2, *x.shape[1:]))
    assert y.shape[:2] == (2, T // 2)
    plain = obvious(expert.apply, params["experts"], x, decision)
    close(y.reshape(plain.shape), plain, rtol=2e-6, atol=1e-5)


def functions_of(package):
    """The functions of a package's public modules."""
    modules = [package]
    for found in pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            modules.append(import_module(found.name))
    functions = {
        value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    own = re.compile(r"moejax(\.[a-z]\w*)*")  # and of no private module
    return {one for one in functions if own.fullmatch(one.__module__)}


def public(package):
    """The same by name."""
    return {one.__name__: one for one in functions_of(package)}


def covered_by(table):
    """The names of the functions in a table; of what a function made, the name of its maker."""
    functions = [one.func if isinstance(one, partial) else one for one in table.values()]
    return {function.__qualname__.split(".")[0] for function in functions}


def test_every_public_rule_is_in_the_table():
    rules = {
        name
        for name, function in public(moejax.rules).items()
        if next(iter(inspect.signature(function).parameters), None) == "logits"
        and function.__annotations__.get("return") in ("Routing", "ExpertChoice", "SoftSlots")
    }
    assert len(rules) > 10
    assert rules <= covered_by(ALL_RULES), f"add {rules - covered_by(ALL_RULES)} to tests/cases.py"


def test_every_public_schedule_is_in_the_table():
    schedules = {
        name
        for name, function in public(moejax.schedules).items()
        if [*inspect.signature(function).parameters][:3] == ["expert", "params", "x"]
        or function.__annotations__.get("return") == "Schedule"
    }
    schedules.remove("mixture")  # takes gates, not a decision; `dense` is its schedule
    schedules.remove("scale_inputs")  # another sum, held to a loop of its own in test_scale_inputs
    assert len(schedules) > 5
    assert schedules <= covered_by(ALL_SCHEDULES), (
        f"add {schedules - covered_by(ALL_SCHEDULES)} to tests/cases.py"
    )


def test_every_public_name_is_looked_at():
    """What the package exports is defined where the two tests above look for it."""
    exported = {getattr(moejax, name) for name in moejax.__all__}
    functions = {one for one in exported if inspect.isfunction(one)}
    assert functions <= functions_of(moejax), functions - functions_of(moejax)
