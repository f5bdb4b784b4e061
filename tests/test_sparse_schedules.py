"""The sparse schedules against the definition, for any expert and any routing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax._sorting import sort_by_expert
from moejax.base import Routing
from moejax.schedules._sorted.slots import Group, assign_slots
from moejax.schedules.capacity import capacity
from moejax.schedules.dropless import dropless, mean_and_blocks

D, F = 4, 5
ample = partial(capacity, factor=8.0)  # at least E / K in every case
SCHEDULES = {"dropless": dropless, "capacity": ample}


def glu(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def glu_params(num_experts):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {
        name: jax.random.normal(key, (num_experts, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def decision(experts, num_experts):
    """A routing to these experts with arbitrary weights, zero where they go nowhere."""
    experts = jnp.asarray(experts)
    weights = jax.random.uniform(jax.random.key(2), experts.shape)
    weights = jnp.where(experts < num_experts, weights, 0)
    scores = jnp.zeros((len(experts), num_experts))
    return Routing(experts, weights, scores, scores)


def random_choices(tokens, k, num_experts, nowhere=0):
    keys = jax.random.split(jax.random.key(3), tokens)
    choices = jax.vmap(lambda key: jax.random.permutation(key, num_experts)[:k])(keys)
    return choices.at[:nowhere].set(num_experts)


def uneven_choices(tokens, num_experts):
    """One choice per token: expert e for a share of tokens that falls with e."""
    return (num_experts * jax.random.uniform(jax.random.key(3), (tokens, 1)) ** 2).astype(int)


CASES = {
    "spread": (random_choices(40, 2, 4), 4),
    "masked tokens": (random_choices(40, 2, 4, nowhere=7), 4),
    "collapsed": (jnp.tile(jnp.array([[2, 0]]), (40, 1)), 4),
    "one expert": (jnp.zeros((9, 1), int), 1),
    "one token": (jnp.array([[3, 1]]), 8),
    "fewer tokens than experts": (random_choices(3, 2, 8), 8),
    "every expert": (random_choices(12, 4, 4), 4),
    "all nowhere": (jnp.full((5, 2), 4), 4),
    "several chunks": (random_choices(1500, 2, 6), 6),
    "by load": (random_choices(700, 2, 16, nowhere=20), 16),
    "by uneven load": (uneven_choices(1500, 16), 16),
    "collapsed onto large blocks": (jnp.tile(jnp.array([[2, 0]]), (1500, 1)), 6),
}


def value_and_gradients(schedule, expert, routing):
    def scalar(params, x, weights):
        y = schedule(expert, params, x, routing._replace(weights=weights))
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_equals_the_definition(schedule, case, x64):
    experts, num_experts = case
    routing, params = double((decision(experts, num_experts), glu_params(num_experts)))
    x = double(jax.random.normal(jax.random.key(4), (len(experts), D)))
    result, expected = (
        jax.jit(value_and_gradients(s, glu, routing))(params, x, routing.weights)
        for s in (schedule, moejax.dense)
    )
    close(result, expected, 1e-10)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition_with_all_experts_at_once(case, monkeypatch, x64):
    """What accelerators run: every expert has as many slots, in the experts' own order."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    test_equals_the_definition(dropless, case, x64)


@pytest.mark.parametrize("case", ["masked tokens", "by uneven load"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_gradient_of_a_gradient(schedule, case, x64):
    experts, num_experts = CASES[case]
    routing = double(decision(experts, num_experts))
    x = jax.random.normal(jax.random.key(4), (len(experts), D))
    params, x = double((glu_params(num_experts), x))

    def second(schedule, params, x, weights):
        _, gradients = value_and_gradients(schedule, glu, routing)(params, x, weights)
        return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(gradients[:2]))

    arguments = params, x, routing.weights
    result, expected = (
        jax.jit(jax.grad(partial(second, s), (0, 1)))(*arguments) for s in (schedule, moejax.dense)
    )
    close(result, expected, 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_what_an_expert_closes_over_has_gradients(schedule):
    routing, params = decision(*CASES["collapsed"]), glu_params(4)
    x = jax.random.normal(jax.random.key(4), (40, D))

    def scalar(schedule, scale):
        return jnp.sum(schedule(lambda p, x: jnp.sin(scale * glu(p, x)), params, x, routing))

    result, expected = (
        [transform(partial(scalar, s)) for transform in (lambda f: jax.grad(f)(2.0), batched)]
        for s in (schedule, moejax.dense)
    )
    close(result, expected, 1e-4)


def double(tree):
    widen = lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return jax.tree.map(widen, tree)


def batched(function):
    return jax.jit(jax.vmap(jax.value_and_grad(function)))(jnp.array([0.5, 2.0]))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_tokens_and_outputs_of_any_shape(schedule):
    """Integer images in, a scalar per token out, and an integer among the parameters."""
    routing = decision(*CASES["spread"])
    x = jax.random.randint(jax.random.key(0), (40, 3, 3, 1), 0, 255).astype(jnp.uint8)
    params = {"weight": jnp.arange(36.0).reshape(4, 3, 3, 1), "shift": jnp.arange(4)}

    def expert(params, x):
        pixels = x.astype(jnp.float32) / 255 + params["shift"].astype(jnp.float32)
        return jnp.sum(params["weight"] * pixels, (1, 2, 3))

    def scalar(schedule, weight):
        y = schedule(expert, params | {"weight": weight}, x, routing)
        return jnp.sum(jnp.sin(y)), y

    result, expected = (
        jax.jit(jax.value_and_grad(partial(scalar, s), has_aux=True))(params["weight"])
        for s in (schedule, moejax.dense)
    )
    assert result[0][1].shape == (40,)
    close(result, expected, 1e-3)


BATCHES = {
    "small": ([CASES["spread"][0], CASES["collapsed"][0]], 4),
    "by load": ([CASES["by uneven load"][0], 15 - CASES["by uneven load"][0]], 16),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_vmap_over_parameters_tokens_and_routing(schedule, batch):
    choices, num_experts = batch
    routings = [decision(experts, num_experts) for experts in choices]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
    params = jax.tree.map(lambda a: jnp.stack([a, -a]), glu_params(num_experts))
    x = jax.random.normal(jax.random.key(4), (2, len(choices[0]), D))

    def gradients(schedule, params, x, routing):
        return value_and_gradients(schedule, glu, routing)(params, x, routing.weights)

    result, expected = (
        jax.jit(jax.vmap(partial(gradients, s)))(params, x, stacked)
        for s in (schedule, moejax.dense)
    )
    close(result, expected)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_tokens(schedule):
    routing = decision(jnp.zeros((0, 2), int), 4)
    assert schedule(glu, glu_params(4), jnp.zeros((0, D)), routing).shape == (0, D)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_empty_slots_hold_no_values_that_are_not_in_the_data(schedule):
    """An expert without a gradient at zero never sees a zero."""
    routing = decision(*CASES["masked tokens"])
    x = jax.random.normal(jax.random.key(4), (40, D)) + 10
    params = {"scale": jnp.ones((4, D))}
    norm = lambda p, x: jnp.sqrt(jnp.sum(p["scale"] * x**2, -1, keepdims=True))  # noqa: E731
    _, gradients = jax.jit(value_and_gradients(schedule, norm, routing))(params, x, routing.weights)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(gradients))


def test_capacity_drops_second_choices_before_first_and_late_tokens_before_early():
    experts = jnp.array([[1, 0], [0, 1], [0, 1], [4, 4], [0, 2]])
    slots = assign_slots(sort_by_expert(experts, 4), len(experts), (Group(4, 2),))
    # Expert 0: tokens 1 and 2 by first choice, then token 4 is dropped, and token 0's second.
    # Expert 1: token 0 by first choice, token 1 by second; token 2's second is dropped.
    assert slots.slot.T.tolist() == [[2, 8], [0, 3], [1, 8], [8, 8], [8, 4]]
    assert slots.filled.tolist() == [True, True, True, True, True, False, False, False]


@pytest.mark.parametrize("num_experts", [1, 3, 16, 18, 64, 256])
@pytest.mark.parametrize("num_choices", [1, 20, 1023, 1500, 8192, 65_537])
def test_groups_hold_every_choice_and_have_a_whole_mean(num_choices, num_experts):
    groups = mean_and_blocks(num_choices, num_experts).groups
    slots = sum(group.size * group.capacity for group in groups)
    assert sum(group.size for group in groups) == num_experts
    assert slots % num_experts == 0
    assert slots >= num_choices or num_choices < num_experts


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order by load is for CPU")
def test_experts_with_most_choices_have_most_slots():
    experts = jnp.array([[1], [3], [1], [0], [3], [1], [1]])  # loads 1, 4, 0, 2
    slots = assign_slots(sort_by_expert(experts, 4), len(experts), (Group(2, 3), Group(2, 1)))
    assert slots.expert.tolist() == [1, 3, 0, 2]
    assert slots.capacity.tolist() == [1, 3, 1, 3]
    assert slots.filled.tolist() == [*[True] * 5, False, True, False]
    assert slots.slot[0].tolist() == [0, 3, 1, 6, 4, 2, 8]  # expert 1's fourth token has none


def test_capacity_keeps_the_other_weights():
    experts = jnp.array([[0, 1], [0, 2], [0, 3]])
    routing = decision(experts, 4)
    params = jnp.arange(1.0, 5.0)[:, None, None]  # expert e multiplies by e + 1
    y = capacity(lambda p, x: x @ p, params, jnp.ones((3, 1)), routing, factor=0.5)
    w = routing.weights
    close(y[:, 0], jnp.array([w[0, 0] + 2 * w[0, 1], 3 * w[1, 1], 4 * w[2, 1]]))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_capacity_refuses_impossible_factors(factor):
    routing = decision(*CASES["spread"])
    with pytest.raises(ValueError, match="`factor` must be a positive number"):
        capacity(glu, glu_params(4), jnp.ones((40, D)), routing, factor=factor)


def test_sorting_is_exact_where_one_integer_does_not_hold_expert_and_choice():
    experts = jax.random.randint(jax.random.key(0), (50, 2), 0, 2**26)
    order, _ = jax.eval_shape(partial(sort_by_expert, num_experts=2**26), experts)
    assert order.shape == (100,)
    small = sort_by_expert(experts % 7, 6)
    ids = np.asarray(experts % 7).T.reshape(-1)
    assert small.order.tolist() == np.argsort(ids, kind="stable").tolist()
    assert small.starts.tolist() == np.searchsorted(np.sort(ids), np.arange(7)).tolist()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="chunks are for CPU")
def test_backward_pass_needs_three_buffers_besides_its_results():
    num_tokens, d, f, num_experts, k = 4096, 64, 128, 64, 2
    expert = moejax.glu(d, f)

    def loss(params, x, logits):
        return jnp.sum(dropless(expert.apply, params, x, moejax.top_k(logits, k=k)) ** 2)

    params = jax.eval_shape(moejax.stack(expert, num_experts).init, jax.random.key(0))
    x, logits = (jax.ShapeDtypeStruct((num_tokens, n), jnp.float32) for n in (d, num_experts))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x, logits).compile()
    buffer = num_tokens * k * f * 4  # bytes
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 3 * buffer
