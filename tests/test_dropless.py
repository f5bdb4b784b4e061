"""The sparse schedules against the definition, where routing is hard: any load, any size."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import normal, on_accelerators, params_of
from reference import close

D, F = 4, 5
SPARSE = {
    "dropless": moejax.dropless,
    "capacity": partial(moejax.capacity, factor=8.0),  # at least E / K in every case
}


def glu(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def glu_params(num_experts):
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {
        name: normal(seed, num_experts, *shape) for seed, (name, shape) in enumerate(shapes.items())
    }


def decision(experts, num_experts):
    """A routing to these experts with arbitrary weights, zero where they go nowhere."""
    weights = np.random.default_rng(2).random(experts.shape) * (experts < num_experts)
    scores = np.zeros((len(experts), num_experts), np.float32)
    routing = moejax.Routing(np.int32(experts), np.float32(weights), scores, scores)
    return jax.device_put(routing)


def random_choices(tokens, k, num_experts, nowhere=0):
    every = np.tile(np.arange(num_experts), (tokens, 1))
    choices = np.random.default_rng(3).permuted(every, axis=1)[:, :k]
    choices[:nowhere] = num_experts
    return choices


def uneven_choices(tokens, num_experts):
    """Two neighbouring experts per token: expert e for a share of tokens that falls with e."""
    first = num_experts * np.random.default_rng(3).random((tokens, 1)) ** 2
    return (first.astype(int) + np.arange(2)) % num_experts


# Cases of one shape share what is compiled for it.
CASES = {
    "spread": (random_choices(40, 2, 4), 4),
    "masked tokens": (random_choices(40, 2, 4, nowhere=7), 4),
    "collapsed": (np.tile([[2, 0]], (40, 1)), 4),
    "all nowhere": (np.full((40, 2), 4), 4),
    "one expert": (np.zeros((9, 1), int), 1),
    "one token": (np.array([[3, 1]]), 8),
    "fewer tokens than experts": (random_choices(3, 2, 8), 8),
    "every expert": (random_choices(12, 4, 4), 4),
    "one expert at a time": (random_choices(1500, 2, 6), 6),
    "collapsed onto large blocks": (np.tile([[2, 0]], (1500, 1)), 6),
    "by load": (random_choices(750, 2, 16, nowhere=20), 16),
    "by uneven load": (uneven_choices(750, 16), 16),
}


def scalar(schedule, expert, params, x, routing):
    y = schedule(expert, params, x, routing)
    return jnp.sum(jnp.sin(y)), y


def value_and_gradients(schedule, expert):
    """By parameters, tokens and weights; the experts chosen have no gradient."""
    function = partial(scalar, schedule, expert)
    return jax.value_and_grad(function, (0, 1, 2), has_aux=True, allow_int=True)


@cache
def compiled(schedule):
    """One function for all cases, so that those of one shape are compiled once."""
    return jax.jit(value_and_gradients(schedule, glu))


@cache
def in_double_precision(case):
    experts, num_experts = CASES[case]
    x = normal(4, len(experts), D)
    return double((glu_params(num_experts), x, decision(experts, num_experts)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_equals_the_definition(schedule, case, x64):
    arguments = in_double_precision(case)
    close(compiled(schedule)(*arguments), compiled(moejax.dense)(*arguments), 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_as_accelerators_run_it(case, x64):
    """An expert without ``matmul``: equally many slots, in the experts' own order."""
    arguments = in_double_precision(case)
    close(compiled(on_accelerators)(*arguments), compiled(moejax.dense)(*arguments), 1e-10)


def scale(width):
    """A layer without `matmul`: it scales every feature."""
    return moejax.Layer(lambda key: jnp.arange(1.0, width + 1), lambda params, x: x * params[None])


BUILT = {
    "linear on sequences": (moejax.linear(D, F), (3,)),
    "glu on images": (moejax.glu(D, 4), (3, 2)),
    "gated, its layer without a product": (moejax.gated(scale(D), moejax.linear(D, 1)), ()),
    "gated, its gate without a product": (moejax.gated(moejax.linear(D, D), scale(D)), ()),
    "mlp of own layers": (moejax.mlp(D, D, D, layer=lambda d_in, _: scale(d_in)), ()),
    "glu of own layers": (moejax.glu(D, D, layer=lambda d_in, _: scale(d_in)), ()),
}


@pytest.mark.parametrize("built", BUILT)
def test_built_layers_are_the_definition_as_accelerators_run_them(built, x64):
    layer, shape = BUILT[built]
    experts, num_experts = CASES["spread"]
    x = normal(4, len(experts), *shape, D)
    params = params_of(moejax.stack(layer, num_experts))
    arguments = double((params, x, decision(experts, num_experts)))

    def value_and_gradient(schedule, params, x, routing):
        def loss(params, x):
            return jnp.sum(schedule(layer.apply, params, x, routing) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    found, expected = (
        jax.jit(partial(value_and_gradient, schedule))(*arguments)
        for schedule in (on_accelerators, moejax.dense)
    )
    close(found, expected, 1e-9)


def test_a_product_of_part_of_the_tokens_is_refused_on_accelerators():
    one_by_one = jax.vmap(moejax.glu(D, 4).apply, in_axes=(None, 0))
    experts, num_experts = CASES["spread"]
    params = params_of(moejax.stack(moejax.glu(D, 4), num_experts))
    x = jnp.ones((len(experts), 5, D))
    with pytest.raises(ValueError, match="leave `matmul` out of its signature"):
        on_accelerators(one_by_one, params, x, decision(experts, num_experts))


def bend(params, x):
    """An expert of one product, with second derivatives: little to compile."""
    return jnp.tanh(x @ params["gate"]) @ params["down"]


@cache
def second_derivatives(schedule, case):
    params, x, routing = in_double_precision(case)

    def second(params, x):
        _, gradients = value_and_gradients(schedule, bend)(params, x, routing)
        return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(gradients[:2]))

    read = {name: params[name] for name in ("gate", "down")}
    return jax.jit(jax.grad(second, (0, 1)))(read, x)


@pytest.mark.parametrize("case", ["masked tokens", "by uneven load"])
@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_gradient_of_a_gradient(schedule, case, x64):
    close(second_derivatives(schedule, case), second_derivatives(moejax.dense, case), 1e-9)


@cache
def gradients_of_what_is_closed_over(schedule):
    params, x, routing = in_double_precision("collapsed")

    def total(scale):
        return jnp.sum(schedule(lambda p, x: jnp.sin(scale * bend(p, x)), params, x, routing))

    return jax.grad(total)(2.0), batched(total)


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_what_an_expert_closes_over_has_gradients(schedule, x64):
    result, expected = map(gradients_of_what_is_closed_over, (schedule, moejax.dense))
    close(result, expected, 1e-10)


@cache
def gradients_under_dropout(schedule):
    """For three keys at once; the experts also close over a permutation and booleans."""
    params, x, routing = in_double_precision("collapsed")

    def total(params, key, order, shown):
        kept = jax.random.bernoulli(key, 0.5, x.shape[1:])

        def dropped(p, x):
            return bend(p, jnp.where(shown & kept, x, 0)[:, order])

        return jnp.sum(schedule(dropped, params, x, routing) ** 2)

    keys, order, shown = (
        jax.random.split(jax.random.key(0), 3),
        np.arange(D)[::-1],
        np.arange(D) > 0,
    )
    axes = (None, 0, None, None)
    return jax.jit(jax.vmap(jax.value_and_grad(total), axes))(params, keys, order, shown)


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_experts_may_close_over_keys_integers_and_booleans(schedule, x64):
    close(gradients_under_dropout(schedule), gradients_under_dropout(moejax.dense), 1e-10)


def double(tree):
    """The same numbers, those that are floats in double precision."""
    tree = jax.device_get(tree)
    widen = lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return jax.device_put(jax.tree.map(widen, tree))


def batched(function):
    return jax.jit(jax.vmap(jax.value_and_grad(function)))(jnp.array([0.5, 2.0]))


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_tokens_and_outputs_of_any_shape(schedule):
    """Integer images in, a scalar per token out, and an integer among the parameters."""
    routing = decision(*CASES["spread"])
    x = np.uint8(np.random.default_rng(0).integers(0, 255, (40, 3, 3, 1)))
    params = {"weight": jnp.arange(36.0).reshape(4, 3, 3, 1), "shift": jnp.arange(4)}

    def expert(params, x):
        pixels = x.astype(jnp.float32) / 255 + params["shift"].astype(jnp.float32)
        return jnp.sum(params["weight"][None] * pixels, (1, 2, 3))

    def total(schedule, weight):
        return scalar(schedule, expert, params | {"weight": weight}, x, routing)

    result, expected = (
        jax.jit(jax.value_and_grad(partial(total, s), has_aux=True))(params["weight"])
        for s in (schedule, moejax.dense)
    )
    assert result[0][1].shape == (40,)
    close(result, expected, 1e-3)


BATCHES = {
    "small": ([CASES["spread"][0], CASES["collapsed"][0]], 4),
    "by load": ([CASES["by uneven load"][0], 15 - CASES["by uneven load"][0]], 16),
}


@cache
def mapped(schedule, batch):
    choices, num_experts = BATCHES[batch]
    routings = [decision(experts, num_experts) for experts in choices]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *routings)
    params = jax.tree.map(lambda a: np.stack([a, -np.asarray(a)]), glu_params(num_experts))
    x = normal(4, 2, len(choices[0]), D)
    return jax.jit(jax.vmap(value_and_gradients(schedule, glu)))(*double((params, x, stacked)))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_vmap_over_parameters_tokens_and_routing(schedule, batch, x64):
    close(mapped(schedule, batch), mapped(moejax.dense, batch), 1e-10)


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_no_tokens(schedule):
    routing = decision(np.zeros((0, 2), int), 4)
    assert schedule(glu, glu_params(4), jnp.zeros((0, D)), routing).shape == (0, D)


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_empty_slots_hold_no_values_that_are_not_in_the_data(schedule):
    """An expert without a gradient at zero never sees a zero."""
    routing = decision(*CASES["masked tokens"])
    x = normal(4, 40, D) + 10
    params = {"scale": jnp.ones((4, D))}
    norm = lambda p, x: jnp.sqrt(jnp.sum(p["scale"][None] * x**2, -1, keepdims=True))  # noqa: E731
    _, (by_params, by_x, _) = jax.jit(value_and_gradients(schedule, norm))(params, x, routing)
    assert np.isfinite(by_params["scale"]).all()
    assert np.isfinite(by_x).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="chunks are for CPU")
def test_backward_pass_needs_three_buffers_besides_its_results():
    num_tokens, d, f, num_experts, k = 4096, 64, 128, 64, 2
    expert = moejax.glu(d, f)

    def loss(params, x, logits):
        return jnp.sum(moejax.dropless(expert.apply, params, x, moejax.top_k(logits, k=k)) ** 2)

    params = jax.eval_shape(moejax.stack(expert, num_experts).init, jax.random.key(0))
    x, logits = (jax.ShapeDtypeStruct((num_tokens, n), jnp.float32) for n in (d, num_experts))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x, logits).compile()
    buffer = num_tokens * k * f * 4  # bytes
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 3 * buffer


class Scaled:
    """An expert as an object: its products are scaled by what it holds."""

    def __init__(self, scale):
        self.scale = scale

    def apply(self, params, x, *, matmul=jnp.matmul):
        return self.scale * matmul(x, params)

    __call__ = apply


def test_a_method_keeps_its_product_on_accelerators(x64):
    experts, num_experts = CASES["spread"]
    params, x = normal(3, num_experts, D, F), normal(4, len(experts), D)
    arguments = double((params, x, decision(experts, num_experts)))
    for expert in (Scaled(2.0).apply, Scaled(2.0)):
        found, expected = (run(expert, *arguments) for run in (on_accelerators, moejax.dense))
        assert found.shape == expected.shape
        close(found, expected, 1e-10)


@pytest.mark.parametrize("schedule", [moejax.dense, moejax.dropless])
def test_an_object_that_changes_is_seen(schedule):
    expert, (experts, num_experts) = Scaled(1.0), CASES["spread"]
    params, x = jnp.ones((num_experts, D, F)), jnp.ones((len(experts), D))
    for bound in (expert, partial(expert), partial(expert.apply)):
        expert.scale = 1.0
        once = schedule(bound, params, x, decision(experts, num_experts))
        expert.scale = 2.0
        close(schedule(bound, params, x, decision(experts, num_experts)), 2 * once, 1e-6)


def test_arrays_that_an_expert_reads_are_told_apart_by_rows(x64):
    experts, num_experts = CASES["spread"]
    params, x = normal(3, num_experts, D, F), normal(4, len(experts), D)
    params, x, routing = double((params, x, decision(experts, num_experts)))

    def loss(schedule, first, second):
        def expert(params, x):  # the same sum, whose arrays are read in another order
            early, late = (first, second) if len(x) % 2 else (second, first)
            return x @ params + (early - first) + (late - second) + first * jnp.sin(second)

        return jnp.sum(schedule(expert, params, x, routing) ** 2)

    grad = jax.grad(loss, argnums=(1, 2))
    arguments = jnp.float64(0.3), jnp.float64(-0.7)
    close(grad(moejax.dropless, *arguments), grad(moejax.dense, *arguments), 1e-9)


@pytest.mark.parametrize("schedule", SPARSE.values(), ids=SPARSE)
def test_experts_without_parameters_may_be_run_in_chunks(schedule):
    x = jnp.arange(1024.0)[:, None]
    routing = moejax.top_k(jnp.cos(x + jnp.arange(4.0)[None]), k=2)  # its gates sum to one
    y, pull = jax.vjp(lambda x: schedule(lambda _, x: 3 * x, {}, x, routing), x)
    np.testing.assert_allclose(y, 3 * x, rtol=1e-6)
    np.testing.assert_allclose(*pull(y), 9 * x, rtol=1e-6)
