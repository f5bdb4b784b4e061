"""What the policy decides, and that the engine does as it says: which pass runs, not how fast."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import on_accelerators, params_of
from moejax.schedules._sorted.policy import (
    CACHED_ROWS,
    Group,
    always_batched,
    experts_per_chunk,
    policy_for_capacity,
    policy_for_dropless,
    worth_batching,
)
from reference import close

T, D, E = 1000, 3, 8


def plain(params, x):
    """An expert without ``matmul``."""
    return x * params


def decision(experts, num_experts=E):
    weights = np.ones(experts.shape, np.float32)
    scores = np.zeros((len(experts), num_experts), np.float32)
    return jax.device_put(moejax.Routing(np.int32(experts), weights, scores, scores))


BALANCED = np.arange(2 * T).reshape(T, 2) % E
COLLAPSED = np.tile([[0, 1]], (T, 1))


def rows_computed(experts, schedule=moejax.dropless):
    """How many rows an expert got at once, in every call of it that ran."""
    seen = []

    def expert(params, x):
        jax.debug.callback(lambda _: seen.append(len(x)), x[0, 0])
        return x * params

    ones = np.ones((T, D), np.float32)
    y = schedule(expert, np.ones(E, np.float32), ones, decision(experts))
    close(y, 2 * ones)
    jax.effects_barrier()
    return {*seen}


def test_balanced_routing_runs_the_batched_pass_and_no_loop():
    capacity = policy_for_dropless(plain, T, E, 2, platform="cpu").groups[0].capacity
    assert rows_computed(BALANCED) == {capacity}


def test_collapsed_routing_runs_the_loops_and_no_batched_pass():
    blocks = policy_for_dropless(plain, T, E, 2, platform="cpu").blocks
    assert rows_computed(COLLAPSED) <= {*blocks}


def test_padding_counts_as_choices_without_a_slot():
    padded = np.where(np.arange(T)[:, None] < 400, BALANCED, E)
    policy = policy_for_dropless(plain, T, E, 2, platform="cpu")
    assert not worth_batching(jnp.asarray(np.arange(2000) < 800), 2000)

    def schedule(expert, params, x, routing):
        nowhere = np.asarray(routing.experts)[:, :1] == E
        return moejax.dropless(expert, params, x, routing) + 2 * np.float32(nowhere)

    assert rows_computed(padded, schedule) <= {*policy.blocks}


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 1), (2, 1), (4, 1), (5, 4), (16, 4)])
def test_few_tokens_go_through_blocks_of_few_rows(num_tokens, rows):
    policy = policy_for_dropless(plain, num_tokens, 64, 2, platform="cpu")
    assert policy.blocks == (rows,)
    assert policy.num_slots == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "loops"),
    [(16, 64, 1), (80, 256, 2), (128, 8, 1), (256, 64, 1), (4096, 8, 2), (4096, 64, 2)],
)
def test_a_second_loop_is_compiled_only_where_it_pays(num_tokens, num_experts, loops):
    policy = policy_for_dropless(plain, num_tokens, num_experts, 2, platform="cpu")
    assert len(policy.blocks) == loops
    assert all(block <= 2 * num_tokens for block in policy.blocks)
    assert list(policy.blocks) == sorted(policy.blocks, reverse=True)


def test_half_of_the_choices_are_worth_a_batched_pass():
    assert worth_batching(jnp.asarray(np.arange(10) < 5), 10)
    assert not worth_batching(jnp.asarray(np.arange(10) < 4), 10)


def test_short_passes_and_those_without_loops_are_not_weighed():
    assert always_batched(policy_for_capacity(E, 10**6, platform="cpu"))
    assert always_batched(policy_for_dropless(plain, 16, E, 2, platform="cpu"))
    assert not always_batched(policy_for_dropless(plain, T, E, 2, platform="cpu"))


@pytest.mark.parametrize("num_experts", [1, 3, 16, 18, 64, 256])
@pytest.mark.parametrize("num_choices", [1, 20, 1023, 1500, 8192, 65_537])
def test_slots_hold_every_choice_of_perfect_balance(num_choices, num_experts):
    policy = policy_for_dropless(plain, num_choices, num_experts, 1, platform="cpu")
    assert policy.num_experts == num_experts
    mean = -(-num_choices // num_experts)
    if num_choices < num_experts or num_experts == 1:
        assert policy.num_slots == 0
    else:
        assert all(group.capacity >= mean for group in policy.groups)


def test_many_experts_have_slots_by_load_on_cpu_alone():
    groups = policy_for_dropless(plain, 4096, 64, 2, platform="cpu").groups
    assert [group.size for group in groups] == [16, 16, 32]
    assert groups[0].capacity > groups[1].capacity > groups[2].capacity >= 128
    assert len(policy_for_dropless(plain, 4096, 64, 2, platform="gpu").groups) == 1


@pytest.mark.parametrize(
    ("num_experts", "capacity", "together"),
    [(64, 10, 4), (64, 150, 4), (64, 300, 2), (6, 100, 3), (8, 1056, 1), (1, 9, 1), (7, 60, 1)],
)
def test_a_chunk_has_few_experts_and_one_where_its_rows_are_many(num_experts, capacity, together):
    assert experts_per_chunk(num_experts, capacity) == together
    assert num_experts % together == 0
    assert together == 1 or together * capacity <= CACHED_ROWS


def test_where_tokens_may_choose_every_expert_only_loops_run():
    policy = policy_for_dropless(plain, T, E, E, platform="cpu")
    assert policy.groups == (Group(E, 0),)
    assert policy.blocks
    one_each = np.where(np.arange(E) == np.arange(T)[:, None] % E, np.arange(E), E)
    few = {*policy.blocks}
    schedule = lambda *given: 2 * moejax.dropless(*given)  # noqa: E731
    assert rows_computed(one_each, schedule) <= few


def test_relu_runs_no_expert_on_every_token():
    expert, router = moejax.linear(D, D), moejax.Layer(lambda key: {}, lambda params, x: x)
    seen = []

    def apply(params, x):
        seen.append(len(x))
        return expert.apply(params, x)

    layer = moejax.Layer(expert.init, apply)
    model = moejax.moe(layer, router, num_experts=D, route=moejax.relu)
    params = jax.eval_shape(model.init, jax.random.key(0))
    jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((T, D), jnp.float32))
    assert max(seen) < T or T not in seen[1:]


def test_experts_that_take_a_product_are_grouped_on_accelerators():
    layer = moejax.glu(4, 6)
    assert policy_for_dropless(layer.apply, 64, 4, 2, platform="gpu").grouped
    assert not policy_for_dropless(layer.apply, 64, 4, 2, platform="cpu").grouped
    assert not policy_for_dropless(plain, 64, 4, 2, platform="gpu").grouped


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_program_for_accelerators_has_no_loop(platform):
    layer, x = moejax.mlp(4, 6, 4), np.ones((64, 4), np.float32)
    params = params_of(moejax.stack(layer, 4))

    def loss(params, x):
        routing = moejax.top_k(x, k=2)
        return jnp.sum(on_accelerators(layer.apply, params, x, routing) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    traced = step.trace(params, x)
    assert " while[" not in str(traced.jaxpr)  # a loop with a fixed number of trips is a scan
    assert "ragged_dot" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_slots_of_an_expert_are_filled_from_its_own_tokens():
    """An empty slot holds no other expert's token and no padding: here both are not numbers."""
    x = np.where(np.arange(40)[:, None] < 30, np.ones((40, D), np.float32), np.float32(np.nan))
    experts = np.where(np.arange(40)[:, None] < 30, [[1, 2]], 4)
    expert = moejax.Layer(lambda key: jnp.ones(()), lambda params, x: x * params)
    params = np.float32([np.inf, 1, 2, 3])
    for schedule in (moejax.dropless, partial(moejax.capacity, factor=2.0)):

        def loss(params, schedule=schedule):
            y = schedule(expert.apply, params, x, decision(experts, 4))
            return jnp.sum(y[:30] ** 2)

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        close(value, 30 * D * 9.0)
        close(gradient, np.float32([0, 540, 540, 0]))
