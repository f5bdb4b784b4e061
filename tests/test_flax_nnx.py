"""Layers as NNX modules: difference zero from the pure functions, whatever transforms them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moejax
from cases import normal
from moejax.interop.flax import BalanceBias, NnxLayer, expert_axes, to_nnx

D, E, T, LAYERS = 4, 8, 16, 3
TOP_2 = partial(moejax.top_k, k=2)
BIASED = moejax.biased(moejax.linear(D, E), E)
ROUTED = moejax.moe(moejax.glu(D, 6), moejax.linear(D, E), num_experts=E, route=TOP_2)
LAYERS_OF_USERS = {
    "moe": ROUTED,
    "moe with a list of params": moejax.moe(
        moejax.mlp(D, 5, D), moejax.linear(D, E), num_experts=E, route=moejax.switch
    ),
    "moe_of": moejax.moe_of(
        moejax.networks(moejax.glu(D, 6), 6),
        moejax.copy_experts(1),
        moejax.constant_experts(1, D),
        router=moejax.linear(D, E),
        route=TOP_2,
    ),
    "with_shared": moejax.with_shared(ROUTED, moejax.glu(D, 3)),
    "biased": moejax.moe(
        moejax.glu(D, 6), BIASED, num_experts=E, route=partial(moejax.sigmoid_top_k, k=2)
    ),
    "glu": moejax.glu(D, 6),
    "one's own": moejax.Layer(lambda key: jnp.ones((1, 1, D)), lambda params, x: params * x),
}


@pytest.fixture
def x():
    return normal(0, 2, T // 2, D)


def same(actual, expected):
    """Equal bit by bit, and of one structure."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def output(result):
    return result[0] if isinstance(result, tuple) else result


def loss(result):
    return jnp.sum(output(result) ** 2)


def loss_and(result):
    """For `grad` with ``has_aux``: one program then gives the gradients and the result itself."""
    return loss(result), result


def made(layer, **options):
    """A module, and the params that the pure functions would have."""
    params = layer.init(nnx.Rngs(0).params())  # not jitted, as the module makes its own
    return to_nnx(layer, rngs=nnx.Rngs(0), **options), params


@cache
def pure_gradients(layer):
    """Of params for tokens, and the result; compiled once for the modules of both kinds."""
    return jax.jit(jax.grad(lambda params, x: loss_and(layer.apply(params, x)), has_aux=True))


@pytest.mark.parametrize("layer", LAYERS_OF_USERS.values(), ids=LAYERS_OF_USERS)
def test_it_is_the_layer(layer, x):
    module, params = made(layer)
    same(module.as_params(), params)
    gradient = nnx.jit(nnx.grad(lambda module, x: loss_and(module(x)), has_aux=True))
    gradients, result = gradient(module, x)
    expected, expected_result = pure_gradients(layer)(params, x)
    same(result, expected_result)
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(jnp.zeros_like, rest)  # the gradients of state that is not trained
    same(nnx.merge(graph, gradients, rest).as_params(), expected)
    assert jax.tree.structure(gradients) == jax.tree.structure(state)


@pytest.mark.parametrize("layer", LAYERS_OF_USERS.values(), ids=LAYERS_OF_USERS)
def test_weights_that_are_there_already(layer, x):
    new, params = made(layer)
    module = NnxLayer(layer, jax.device_get(params))  # such as `load` reads them
    same(module.as_params(), params)
    assert nnx.graphdef(module) == nnx.graphdef(new)  # so a compiled function is not traced again
    same(nnx.jit(lambda module, x: module(x))(module, x), jax.jit(layer.apply)(params, x))


def test_paths_are_those_of_the_params():
    module, _ = made(LAYERS_OF_USERS["with_shared"])
    paths = {"/".join(path) for path in nnx.to_flat_state(nnx.state(module)).paths}
    assert "routed/experts/gate/kernel" in paths
    assert {"shared/up/kernel", "routed/router/bias"} < paths
    assert module.routed.experts.gate.kernel.shape == (E, D, 6)


def test_jax_jit_takes_the_module(x):
    module, params = made(ROUTED)
    same(jax.jit(lambda module, x: module(x))(module, x), jax.jit(ROUTED.apply)(params, x))


@pytest.mark.parametrize("graph", [True, False], ids=["graph mode", "tree mode"])
def test_modes(graph, x):
    module, params = made(ROUTED)
    function = nnx.grad(lambda module: loss_and(module(x)), has_aux=True, graph=graph)
    gradients, result = nnx.jit(function, graph=graph)(module)
    expected, expected_result = pure_gradients(ROUTED)(params, x)
    same(result, expected_result)
    same(jax.tree.leaves(gradients), jax.tree.leaves(expected))


def test_split_and_merge(x):
    module, params = made(ROUTED)
    graph, state = nnx.split(module)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    same(forward(state, x), jax.jit(ROUTED.apply)(params, x))


def test_value_and_grad_with_an_optimizer(x, standard_promotion):
    module, params = made(ROUTED)
    adam = optax.adam(1e-2)
    optimizer = nnx.Optimizer(module, adam, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, gradients = nnx.value_and_grad(lambda module: loss(module(x)))(module)
        optimizer.update(module, gradients)
        return value

    @jax.jit
    def pure_step(params, state):
        value, gradients = jax.value_and_grad(lambda p: loss(ROUTED.apply(p, x)))(params)
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = adam.init(params)  # not jitted either
    for _ in range(3):
        value = step(module, optimizer)
        params, state, expected = pure_step(params, state)
        same(value, expected)
    same(module.as_params(), params)


def layers_of(layer, **options):
    """One module whose variables have a leading axis of layers."""

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs):
        return to_nnx(layer, rngs=rngs, **options)

    return make(nnx.Rngs(0))


def test_scan_over_layers(x):
    modules = layers_of(ROUTED)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def run(module, x):
        return module(x)

    @jax.jit
    def pure(params, x):
        return jax.lax.scan(lambda x, params: ROUTED.apply(params, x), x, params)

    same(nnx.jit(run)(modules, x), pure(modules.as_params(), x))


def test_vmap_over_layers(x):
    modules = layers_of(ROUTED)
    run = nnx.jit(nnx.vmap(lambda module, x: module(x), in_axes=(0, None)))
    pure = jax.jit(jax.vmap(ROUTED.apply, in_axes=(0, None)))
    same(run(modules, x), pure(modules.as_params(), x))


def test_remat(x):
    module, params = made(ROUTED)
    run = nnx.remat(lambda module, x: module(x)[0])
    gradients = nnx.jit(nnx.grad(lambda module: jnp.sum(run(module, x) ** 2)))(module)
    pure = jax.checkpoint(lambda params: ROUTED.apply(params, x)[0])
    expected = jax.jit(jax.grad(lambda params: jnp.sum(pure(params) ** 2)))(params)
    same(jax.tree.leaves(gradients), jax.tree.leaves(expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("as_dict", [True, False], ids=["pure dict", "state"])
def test_orbax(as_dict, tmp_path):
    import orbax.checkpoint as ocp

    module, params = made(LAYERS_OF_USERS["moe with a list of params"])
    other = to_nnx(LAYERS_OF_USERS["moe with a list of params"], rngs=nnx.Rngs(1))
    pure = nnx.to_pure_dict if as_dict else lambda state: state
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", pure(nnx.state(module)))
        checkpointer.wait_until_finished()
        state = nnx.state(other)
        found = checkpointer.restore(tmp_path / "state", pure(state))
    if as_dict:
        nnx.replace_by_pure_dict(state, found)
    nnx.update(other, state if as_dict else found)
    same(other.as_params(), params)


def test_mask_and_noise(x, key):
    layer = moejax.moe(
        moejax.glu(D, 6),
        moejax.noisy(moejax.linear(D, E), moejax.linear(D, E)),
        num_experts=E,
        route=partial(moejax.noisy_top_k, k=2),
    )
    module, params = made(layer)
    mask = np.arange(T // 2)[None] < np.array([[3], [7]])
    rngs = nnx.Rngs(0, routing=5)
    noise = nnx.Rngs(routing=5).routing()
    actual = module(x, mask=mask, key=rngs.routing())
    same(actual, layer.apply(params, x, mask=mask, key=noise))
    assert not jnp.array_equal(module(x, key=rngs.routing())[0], module(x)[0])
    same(module(x, key=None, mask=None), layer.apply(params, x))


def test_a_balance_bias_is_state_of_its_own(x, standard_promotion):
    layer = LAYERS_OF_USERS["biased"]
    module, params = made(layer)
    optimizer = nnx.Optimizer(module, optax.adamw(1e-2, weight_decay=0.5), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def objective(module):
            y, routing = module(x)
            bias = module.router.balance_bias
            bias[...] = moejax.update_balance_bias(bias[...], routing, rate=1e-3)
            return jnp.sum(y**2)

        gradients = nnx.grad(objective)(module)
        optimizer.update(module, gradients)
        return gradients

    _, routing = jax.jit(layer.apply)(params, x)
    gradients = step(module, optimizer)
    expected = moejax.update_balance_bias(jnp.zeros(E), routing, rate=1e-3)
    same(module.router.balance_bias[...], expected)
    assert expected.any()
    for tree in (gradients, nnx.state(optimizer)):
        assert not [p for p in nnx.to_flat_state(tree).paths if "balance_bias" in p]
    assert len(jax.tree.leaves(nnx.state(module, BalanceBias))) == 1


def test_param_dtype(x):
    module, params = made(ROUTED, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("bfloat16")}
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    y, routing = module(x)
    same((y, routing), ROUTED.apply(cast, x))
    assert y.dtype == x.dtype


MESH_AXES = ((2, 4), ("data", "expert"))


@pytest.fixture
def mesh():
    return jax.make_mesh(*MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def on_mesh(mesh):
    execute = moejax.sharding.expert_parallel(mesh)
    return moejax.moe(
        moejax.glu(D, 6), moejax.linear(D, E), num_experts=E, route=TOP_2, execute=execute
    )


def test_on_a_mesh(mesh, x):
    layer = on_mesh(mesh)

    @nnx.jit
    def make():
        return to_nnx(layer, rngs=nnx.Rngs(0), axes=expert_axes)

    with jax.set_mesh(mesh):
        module = make()
        y, routing = nnx.jit(lambda module, x: module(x))(module, x)
    kernel = module.experts.gate.kernel[...]
    along = jax.NamedSharding(mesh, jax.P("expert", None, None))
    assert kernel.sharding.is_equivalent_to(along, kernel.ndim)
    assert kernel.sharding.shard_shape(kernel.shape) == (E // 4, D, 6)
    assert module.router.kernel[...].sharding.is_fully_replicated
    _, params = made(ROUTED)
    with jax.set_mesh(mesh):
        loaded = NnxLayer(layer, jax.device_get(params), axes=expert_axes)
    assert loaded.experts.gate.kernel[...].sharding.is_equivalent_to(along, kernel.ndim)
    expected, decision = jax.jit(ROUTED.apply)(params, x)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(routing.experts, decision.experts)


def test_axes_without_a_mesh_are_metadata(mesh):
    module, _ = made(ROUTED, axes=expert_axes)
    specs = nnx.get_partition_spec(nnx.state(module))
    assert specs["experts"]["gate"]["kernel"].get_value() == jax.P("expert", None, None)
    state = jax.device_put(nnx.state(module), nnx.get_named_sharding(nnx.state(module), mesh))
    assert state["experts"]["gate"]["kernel"][...].sharding.spec == jax.P("expert", None, None)


def test_axes_of_layers():
    modules = layers_of(ROUTED, axes=expert_axes)
    specs = nnx.get_partition_spec(nnx.state(modules))
    assert specs["experts"]["gate"]["kernel"].get_value() == jax.P(None, "expert", None, None)


def test_a_balance_bias_keeps_its_dtype(key):
    layer = moejax.moe(
        moejax.glu(D, 6), BIASED, num_experts=E, route=partial(moejax.sigmoid_top_k, k=2)
    )
    module = to_nnx(layer, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    assert module.experts.gate.kernel[...].dtype == jnp.bfloat16
    assert module.router.balance_bias[...].dtype == jnp.float32
