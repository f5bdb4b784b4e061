"""Parameters of one mixture from those of another: the function stays where it is said to."""

from functools import cache, partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moejax
from cases import normal, params_of
from moejax.interop.flax import from_nnx, to_nnx

D, E = 3, 4
X = np.random.default_rng(0).normal(size=(16, D))
LAYERS = {"linear": moejax.linear(D, 2), "mlp": moejax.mlp(D, 5, 2), "glu": moejax.glu(D, 5)}
close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
pytestmark = pytest.mark.usefixtures("x64")


def doubles_of(layer):
    return jax.device_put(jax.tree.map(np.float64, params_of(layer)))


def mixture(num_experts=E, layer=LAYERS["mlp"], bias=True, **options):
    router = moejax.linear(D, num_experts, bias=bias)
    return moejax.moe(layer, router, num_experts=num_experts, execute=moejax.dense, **options)


@cache
def compiled(operate, **options):
    """As one program for all tests that take it; eagerly every leaf takes several."""
    return jax.jit(partial(operate, **options))


def grow(params, key=None, **options):
    return compiled(moejax.grow, **options)(params, key=key)


def output(model, params):
    return model.apply(params, jnp.asarray(X))[0]


RULES = {
    "softmax": (moejax.softmax, 1),
    "renormalised": (partial(moejax.top_k, k=3), 1),
    "raw": (partial(moejax.top_k, k=3, renormalize=False), 3 / 4),
    "switch": (moejax.switch, 1 / 4),
    "raw sigmoids": (partial(moejax.sigmoid_top_k, k=3, renormalize=False), 3 / 2),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_upcycled_mixture_is_the_layer(rule, layer):
    route, total = RULES[rule]
    dense = doubles_of(LAYERS[layer])
    router = doubles_of(moejax.linear(D, E))
    params = compiled(moejax.upcycle, num_experts=E, total=total)(dense, router)
    model = mixture(layer=LAYERS[layer], route=route)
    close(output(model, params), LAYERS[layer].apply(dense, jnp.asarray(X)))


def test_upcycled_router_starts_even_and_copies_may_differ(key):
    dense, router = doubles_of(LAYERS["mlp"]), doubles_of(moejax.linear(D, E))
    upcycle = compiled(moejax.upcycle, num_experts=E, noise=0.1)
    params = jax.device_get(upcycle(dense, router, key=key))
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["router"]))
    kernels = params["experts"]["layers"][0]["kernel"]
    close(kernels[0], dense["layers"][0]["kernel"])
    differences = kernels[1:] - kernels[:1]
    np.testing.assert_allclose(differences.std(), 0.1 * kernels[0].std(), rtol=0.4)


@pytest.mark.parametrize("num_experts", [4, 5, 7, 8, 12])
def test_grown_mixture_of_all_experts_is_the_same(num_experts):
    params = doubles_of(mixture())
    grown = grow(params, num_experts=num_experts)
    close(output(mixture(num_experts), grown), output(mixture(), params))


@pytest.mark.parametrize("num_experts", [5, 8])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "softmax"])
def test_grown_mixture_of_the_best_is_the_same_with_an_offset(rule, num_experts, key):
    model = partial(mixture, layer=LAYERS["linear"], route=RULES[rule][0])
    params = doubles_of(model())
    grown = grow(params, num_experts=num_experts, offset=50.0, noise=0.1, key=key)
    close(output(model(num_experts), grown), output(model(), params))


def test_grown_mixture_of_twice_the_best_is_the_same():
    params = doubles_of(mixture(bias=False))
    grown = grow(params, num_experts=2 * E)
    twice = mixture(2 * E, bias=False, route=partial(moejax.top_k, k=4))
    close(
        output(twice, grown),
        output(mixture(bias=False, route=partial(moejax.top_k, k=2)), params),
    )


def test_noise_of_growth_is_on_the_copies_alone(key):
    one = normal(0, E, 30, 30, dtype=float)
    params = {"router": params_of(mixture())["router"], "experts": {"one": one, "three": 3 * one}}
    grown = grow(params, num_experts=2 * E, noise=0.1, key=key)["experts"]
    grown, old = jax.device_get((grown, params["experts"]))
    added = jax.tree.map(lambda new, old: new - np.tile(old, (2, 1, 1)), grown, old)
    assert not any(leaf[:E].any() for leaf in added.values())
    noise = np.concatenate([added["one"][E:], added["three"][E:] / 3]).reshape(2 * E, -1)
    np.testing.assert_allclose(noise.std(axis=1), 0.1 * one.std(), rtol=0.1)
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(2 * E), atol=0.15)


PRUNED = {  # whether a rule's weights depend on the chosen experts alone
    "renormalised": (partial(moejax.top_k, k=2), True),
    "sigmoids": (partial(moejax.sigmoid_top_k, k=2), True),
    "raw sigmoids": (partial(moejax.sigmoid_top_k, k=2, renormalize=False), True),
    "raw": (partial(moejax.top_k, k=2, renormalize=False), False),
    "switch": (moejax.switch, False),
}


@pytest.mark.parametrize(("route", "is_same"), PRUNED.values(), ids=PRUNED)
def test_pruning_experts_that_nobody_chooses(route, is_same):
    params = doubles_of(mixture())
    bias = np.array(params["router"]["bias"])
    bias[1] = -5
    params["router"]["bias"] = jax.device_put(bias)
    before, routing = mixture(route=route).apply(params, jnp.asarray(X))
    load = moejax.expert_load(routing)
    assert load[1] == 0
    pruned = compiled(moejax.prune, keep=(0, 2, 3))(params)
    after = output(mixture(3, route=route), pruned)
    assert np.allclose(after, before, rtol=1e-9) == is_same


def test_merged_experts_are_their_weighted_mean():
    params = doubles_of(mixture(layer=LAYERS["linear"]))
    load = np.array([1, 0, 2, 5])
    merged = moejax.merge(params, load)
    kernels = np.asarray(params["experts"]["kernel"])
    close(merged["kernel"], np.tensordot(np.array([1, 0, 2, 5]) / 8, kernels, axes=1))
    within = jax.jit(lambda params: moejax.merge(params, load))(params)
    close(within["kernel"], merged["kernel"])
    equal = compiled(moejax.upcycle, num_experts=E)(doubles_of(LAYERS["mlp"]), params["router"])
    one = jax.jit(lambda params: moejax.merge(params, load))(equal)
    close(LAYERS["mlp"].apply(one, jnp.asarray(X)), output(mixture(), equal))


def test_the_moments_of_an_optimizer_follow():
    model = moejax.with_shared(mixture(), LAYERS["mlp"])
    params = doubles_of(model)
    optimizer = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(lambda params: optimizer.update(params, optimizer.init(params)))(params)
    ids = [2, 0]
    operate = partial(moejax.take_experts, ids=ids)
    smaller, moments = jax.jit(partial(moejax.map_mixtures, operate))((params, state))
    assert jax.tree.structure(moments[0].mu) == jax.tree.structure(smaller)
    assert moments[0].count == state[0].count
    for moment, before in ((moments[0].mu, state[0].mu), (moments[0].nu, state[0].nu)):
        jax.tree.map(lambda a, b: close(a.shape, b.shape), moment, smaller)
        close(
            moment["routed"]["experts"]["layers"][0]["kernel"],
            np.asarray(before["routed"]["experts"]["layers"][0]["kernel"])[ids],
        )


def test_routers_of_several_parts():
    router = moejax.noisy(moejax.mlp(D, 5, E), moejax.linear(D, E))
    params = {"router": params_of(router), "experts": {"kernel": np.ones((E, D, 2))}}
    smaller = jax.eval_shape(partial(moejax.prune, keep=[3, 1]), params)["router"]
    assert smaller["router"]["layers"][1]["kernel"].shape == (5, 2)
    assert smaller["router"]["layers"][0]["kernel"].shape == (D, 5)
    assert smaller["noise"]["kernel"].shape == (D, 2)


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (partial(moejax.prune, keep=[0, 0]), "distinct ids of the 4 experts, got \\[0, 0\\]"),
        (partial(moejax.prune, keep=[4]), "distinct ids of the 4 experts, got \\[4\\]"),
        (partial(moejax.prune, keep=[]), "distinct ids"),
        (
            partial(moejax.prune, keep=[0.0, 2.0]),
            "distinct ids of the 4 experts, got \\[0.0, 2.0\\]",
        ),
        (partial(moejax.take_experts, ids=[]), "a list of ids of the 4 experts, .*, got \\[\\]"),
        (partial(moejax.take_experts, ids=3), "a list of ids of the 4 experts, .*, got 3"),
        (partial(moejax.take_experts, ids=[0.0]), "integers in \\[0, 4\\), got \\[0.0\\]"),
        (partial(moejax.grow, num_experts=8.0), "`num_experts` must be an integer, .*, got 8.0"),
        (partial(moejax.grow, num_experts=3), "at least 4, got 3: use `prune`"),
        (partial(moejax.grow, num_experts=8, noise=0.1), "`noise` needs a `key`"),
        (partial(moejax.merge, load=np.ones(3)), "one number per expert, \\[4\\], got \\[3\\]"),
        (partial(moejax.merge, load=np.zeros(4)), "positive for one expert"),
    ],
)
def test_what_cannot_be_done_is_refused(operate, message):
    with pytest.raises(ValueError, match=message):
        operate(params_of(mixture()))


def test_structures_that_are_not_known_are_refused():
    params = params_of(mixture(bias=False))
    with pytest.raises(ValueError, match="The router must have a bias"):
        grow(params, num_experts=6)
    with pytest.raises(ValueError, match="The layer must end in a `linear`"):
        moejax.upcycle({"w": np.ones(3)}, params["router"], num_experts=2, total=0.5)
    with pytest.raises(ValueError, match="The layer must end in a `linear`"):
        moejax.upcycle(params, params["router"], num_experts=2, total=0.5)  # not in its router
    with pytest.raises(ValueError, match="`total` must be positive"):
        moejax.upcycle({"w": np.ones(3)}, params["router"], num_experts=2, total=0.0)


def test_what_experts_do_not_learn_is_left_alone(key):
    layer = {"kernel": np.ones((4, 4), np.float32), "zero_point": np.array(4), "key": key}
    router = params_of(moejax.linear(4, 3))
    params = moejax.upcycle(layer, router, num_experts=3, total=0.5, noise=0.1, key=key)
    params = moejax.grow(params, num_experts=6, noise=0.1, key=key)
    np.testing.assert_array_equal(params["experts"]["zero_point"], np.full(6, 4))
    keys = np.asarray(jax.random.key_data(params["experts"]["key"]))
    np.testing.assert_array_equal(keys, np.tile(jax.random.key_data(key), (6, 1)))
    assert np.all(params["experts"]["kernel"] > 1)
    with pytest.raises(ValueError, match="have a mean, got a leaf of"):
        moejax.merge(params, np.ones(6))


@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize("id_", [-1, E])
def test_experts_that_are_not_there_are_not_taken(id_, part):
    params = params_of(mixture())
    params = {"router": {"kernel": np.ones((D, E))}, "experts": {}, part: params[part]}
    message = rf"of the 4 experts, integers in \[0, 4\), got \[0, {id_}\]"
    with pytest.raises(ValueError, match=message):
        moejax.take_experts(params, [0, id_])
    bias = {"router": params["router"], "bias": np.zeros(E)}
    with pytest.raises(ValueError, match=message):
        moejax.take_experts({"router": bias, "experts": {}}, [0, id_])


@pytest.mark.parametrize("options", [{"offset": 30.0}, {"noise": 0.1}], ids=["offset", "noise"])
@pytest.mark.parametrize("num_experts", [6, 8])
def test_moments_follow_growth_by_taking_experts(num_experts, options, key):
    params = doubles_of(mixture(layer=LAYERS["linear"]))
    optimizer = optax.adam(1e-3)
    grown = grow(params, num_experts=num_experts, key=key, **options)
    take = partial(moejax.take_experts, ids=np.arange(num_experts) % E)

    @jax.jit
    def follow(params, grown):
        _, state = optimizer.update(params, optimizer.init(params))
        return optimizer.update(grown, moejax.map_mixtures(take, state), grown)[0]

    with jax.numpy_dtype_promotion("standard"):
        updates = follow(params, grown)
    assert jax.tree.structure(updates) == jax.tree.structure(grown)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("router", [moejax.linear(D, E), moejax.mlp(D, 5, E)])
def test_an_upcycled_router_learns(router, key):
    dense = doubles_of(LAYERS["linear"])
    model = moejax.moe(LAYERS["linear"], router, num_experts=E, execute=moejax.dense)
    upcycle = compiled(moejax.upcycle, num_experts=E, noise=0.1)
    params = upcycle(dense, doubles_of(router), key=key)
    np.testing.assert_array_equal(router.apply(params["router"], jnp.asarray(X)), 0)

    def step(params, _):
        gradient = jax.grad(lambda params: jnp.sum(output(model, params) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradient), None

    before = params["router"]
    params, _ = jax.lax.scan(step, params, length=3)
    kernels = [leaf for leaf in jax.tree.leaves(params["router"]) if leaf.ndim == 2]
    old = [leaf for leaf in jax.tree.leaves(before) if leaf.ndim == 2]
    assert not any(np.array_equal(*pair) for pair in zip(kernels, old, strict=True))


def test_a_router_without_a_last_linear_layer_is_refused():
    router = params_of(moejax.cosine(D, 2, E))
    with pytest.raises(ValueError, match="The router must end in a `linear`"):
        compiled(moejax.upcycle, num_experts=E)(params_of(LAYERS["mlp"]), router)


def test_an_offset_keeps_copies_from_a_choice_by_bias():
    def biased(num_experts):
        router = moejax.biased(moejax.linear(D, num_experts), num_experts)
        route = partial(moejax.sigmoid_top_k, k=2)
        options = {"num_experts": num_experts, "execute": moejax.dense}
        return moejax.moe(LAYERS["mlp"], router, route=route, **options)

    params = doubles_of(biased(E))
    params["router"]["balance_bias"] = np.array([0.5, -0.2, -0.2, -0.1])
    grown = grow(params, num_experts=2 * E, offset=2.0)
    close(output(biased(2 * E), grown), output(biased(E), params))


def assert_its_states_follow(optimizer, operate, params):
    """Surgery on an optimizer's state has the shapes of a state made after surgery."""
    after = partial(moejax.map_mixtures, operate)
    followed = jax.eval_shape(lambda params: after(optimizer.init(params)), params)
    expected = jax.eval_shape(lambda params: optimizer.init(operate(params)), params)
    assert jax.tree.map(jnp.shape, followed) == jax.tree.map(jnp.shape, expected)


def test_parameters_that_an_optimizer_leaves_alone_are_left_alone():
    params = params_of(mixture())
    mask = {"router": {"kernel": True, "bias": False}, "experts": True}
    optimizers = {
        "masked": optax.masked(optax.adam(1e-3), mask),
        "by label": optax.multi_transform(
            {"a": optax.adam(1e-3), "b": optax.adam(1e-4)}, {"router": "a", "experts": "b"}
        ),
    }
    take = partial(moejax.take_experts, ids=[0, 2])
    for optimizer in optimizers.values():
        assert_its_states_follow(optimizer, take, params)


EVERY = {
    "upcycle": lambda params: moejax.upcycle(
        jax.tree.map(lambda leaf: leaf[0], params["experts"]), params["router"], num_experts=3
    ),
    "grow": partial(moejax.grow, num_experts=8),
    "prune": partial(moejax.prune, keep=[0, 1]),
    "merge": partial(moejax.merge, load=np.ones(E)),
    "take_experts": partial(moejax.take_experts, ids=[0, 1]),
}


@pytest.mark.parametrize("operate", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [2, E])
def test_stacked_layers_are_mapped_over(num_layers, bias, operate):
    stacked = params_of(moejax.stack(mixture(bias=bias), num_layers))
    with pytest.raises(ValueError, match=r"those of one `moe`.* over stacked layers with `jax.vm"):
        jax.eval_shape(operate, stacked)


@pytest.mark.parametrize("operate", [EVERY["prune"], EVERY["take_experts"]])
def test_surgery_maps_over_stacked_layers(operate):
    stacked = params_of(moejax.stack(mixture(), E))
    pruned = jax.device_get(jax.jit(jax.vmap(operate))(stacked))
    first = jax.jit(operate)(jax.tree.map(lambda leaf: np.asarray(leaf)[0], stacked))
    jax.tree.map(lambda all_layers, one: close(all_layers[0], one), pruned, first)


@pytest.mark.parametrize("operate", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("num_zero", [0, 1])
def test_banks_of_experts_are_refused(num_zero, operate):
    banks = [moejax.networks(LAYERS["mlp"], E)] * 2
    banks += [moejax.zero_experts(1)] * num_zero
    router = moejax.linear(D, 2 * E + num_zero)
    params = params_of(moejax.moe_of(*banks, router=router, route=moejax.softmax))
    with pytest.raises(ValueError, match=r"those of one `moe`.* the banks of `moe_of` by hand"):
        jax.eval_shape(operate, params)


def test_a_router_for_other_experts_is_refused():
    params = {**params_of(mixture()), "router": params_of(moejax.linear(D, E + 1))}
    for operate in EVERY.values():
        with pytest.raises(ValueError, match=r"experts \[[34], .* and a router \[5\] and \[3, 5\]"):
            jax.eval_shape(operate, params)


def test_only_known_routers_tell_how_many_experts_there_are():
    params = {**params_of(mixture()), "router": params_of(moejax.cosine(D, 2, E))}
    merged = jax.eval_shape(partial(moejax.merge, load=np.ones(E)), params)
    assert merged["layers"][1]["kernel"].shape == (5, 2)
    with pytest.raises(ValueError, match="The router must end in a `linear`"):
        moejax.prune(params, [0, 1])


@pytest.mark.parametrize(
    "to_type", [flax.core.freeze, nnx.State, lambda tree: {"block": flax.core.freeze(tree)}]
)
def test_mixtures_in_other_mappings_are_found(to_type):
    params, take = params_of(mixture()), partial(moejax.take_experts, ids=[2, 0])
    tree = to_type({"moe": params})
    changed = moejax.map_mixtures(take, tree)
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    expected = to_type({"moe": take(params)})
    jax.tree.map(close, changed, expected)
    changed = moejax.map_mixtures(take, to_type(params))
    jax.tree.map(close, changed, to_type(take(params)))


@pytest.mark.parametrize(
    "operate", [partial(moejax.prune, keep=[2, 0]), partial(moejax.grow, num_experts=2 * E)]
)
def test_a_module_and_its_optimizer_change_alike(operate, standard_promotion):
    layer = moejax.moe(LAYERS["mlp"], moejax.mlp(D, 5, E), num_experts=E)
    params = params_of(layer)
    module = to_nnx(layer._replace(init=lambda key: params), rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    moments = jax.jit(lambda: nnx.state(nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)))()
    changed, followed = jax.jit(partial(moejax.map_mixtures, operate))((state, moments))
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    assert jax.tree.structure(followed) == jax.tree.structure(moments)
    shapes = jax.tree.leaves(jax.tree.map(jnp.shape, followed["opt_state"][0]["mu"]))
    assert shapes == jax.tree.leaves(jax.tree.map(jnp.shape, changed))
    expected = jax.tree.leaves(jax.jit(operate)(params))
    jax.tree.map(close, jax.tree.leaves(changed), expected)


@pytest.mark.parametrize("digits", [str, int])
def test_the_last_of_numbered_layers_is_the_last_by_number(digits):
    made = params_of(moejax.mlp(*[D] * 11, E))["layers"]
    router = {"layers": {digits(number): layer for number, layer in enumerate(made)}}
    params = {"router": router, "experts": {"kernel": np.ones((E, D, 2))}}
    layers = moejax.prune(params, [3, 1])["router"]["layers"]
    close(layers[digits(10)]["kernel"], np.asarray(made[10]["kernel"])[:, [3, 1]])
    close(layers[digits(9)]["kernel"], made[9]["kernel"])


def test_a_router_of_flax_ends_in_its_last_layer():
    def make(rngs):
        return nnx.Sequential(nnx.Linear(D, 5, rngs=rngs), jnp.tanh, nnx.Linear(5, E, rngs=rngs))

    model = moejax.moe(LAYERS["linear"], from_nnx(make), num_experts=E)
    params = jax.eval_shape(partial(moejax.prune, keep=[3, 1]), params_of(model))
    assert params["router"]["layers"][2]["kernel"].shape == (5, 2)


@pytest.mark.parametrize(
    "operate",
    [
        partial(moejax.take_experts, ids=[3, 1, 0]),
        partial(moejax.prune, keep=[3, 1, 0]),
        partial(moejax.grow, num_experts=3 * E),
    ],
)
@pytest.mark.parametrize("factored", [False, True])
def test_what_adafactor_keeps_in_place_of_a_moment_is_left_alone(factored, operate):
    params = params_of(moejax.moe(moejax.mlp(16, 17, 2), moejax.linear(16, E), num_experts=E))
    optimizer = optax.adafactor(factored=factored, min_dim_size_to_factor=16)
    assert_its_states_follow(optimizer, operate, params)


@pytest.mark.parametrize("d_model", [E, E + 3])
def test_factored_moments_of_a_router_are_refused(d_model):
    model = moejax.moe(moejax.linear(d_model, 2), moejax.linear(d_model, E), num_experts=E)
    optimizer = optax.adafactor(min_dim_size_to_factor=E)
    with pytest.raises(ValueError, match="a factored moment cannot follow its parameter"):
        assert_its_states_follow(
            optimizer, partial(moejax.take_experts, ids=[0, 2]), params_of(model)
        )


def test_one_expert_has_a_bias_of_one_number():
    grown = grow(params_of(mixture(1, LAYERS["linear"])), num_experts=E)
    assert grown["router"]["bias"].shape == (E,)


def test_moments_that_an_optimizer_does_not_keep_are_pruned_too():
    params = params_of(mixture())
    prune = partial(moejax.prune, keep=[0, 2])
    for mask in ({"router": True, "experts": False}, {"router": False, "experts": False}):
        optimizer = optax.masked(optax.adam(1e-3), mask)
        assert_its_states_follow(optimizer, prune, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_equal_experts_merge_into_themselves(dtype):
    one = normal(0, 50, 3, dtype=dtype)
    experts = {"kernel": jax.device_put(np.stack([one] * 60))}
    merged = moejax.merge({"router": {}, "experts": experts}, np.ones(60))["kernel"]
    assert merged.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(merged, np.float64),
        np.asarray(one, np.float64),
        rtol=0 if jnp.finfo(dtype).bits == 16 else 60 * float(jnp.finfo(dtype).eps),
    )
