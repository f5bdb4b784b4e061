"""Layers as Linen modules: difference zero from the pure functions, whatever lifts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, traverse_util

import moejax
from cases import params_of
from moejax.interop.flax import expert_axes, linen_variables, to_linen
from test_flax_nnx import (
    LAYERS,
    LAYERS_OF_USERS,
    ROUTED,
    D,
    E,
    T,
    loss_and,
    on_mesh,
    pure_gradients,
    same,
)
from test_flax_nnx import mesh as mesh
from test_flax_nnx import x as x


def by_name(tree):
    """The leaves by name, lists and dicts alike."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/") or "value": v for p, v in leaves}


def variables_of(module, x):
    """Variables of the shapes and dtypes that `init` gives them."""
    return params_of(moejax.Layer(lambda key: module.init(key, x), module.apply))


def pure_params(layer, variables):
    """The variables of the module in the structure of the layer's params."""
    flat = {name: value for each in variables.values() for name, value in by_name(each).items()}
    like = jax.eval_shape(layer.init, jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in by_name(like)])


@pytest.mark.parametrize("layer", LAYERS_OF_USERS.values(), ids=LAYERS_OF_USERS)
def test_it_is_the_layer(layer, x):
    module = to_linen(layer)
    variables = variables_of(module, x)
    params = pure_params(layer, variables)
    objective = lambda variables: loss_and(module.apply(variables, x))  # noqa: E731
    gradients, result = jax.jit(jax.grad(objective, has_aux=True))(variables)
    expected, expected_result = pure_gradients(layer)(params, x)
    same(result, expected_result)
    same(pure_params(layer, gradients), expected)


@pytest.mark.parametrize("layer", LAYERS_OF_USERS.values(), ids=LAYERS_OF_USERS)
def test_weights_that_are_there_already(layer, key, x):
    params, module = params_of(layer), to_linen(layer)
    variables = linen_variables(params)
    same(jax.jit(module.apply)(variables, x), jax.jit(layer.apply)(params, x))
    like = jax.eval_shape(module.init, key, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)


def test_paths_in_a_model(key, x):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return to_linen(ROUTED)(x)

    params = jax.eval_shape(Model().init, key, x)["params"]["LinenLayer_0"]
    assert params["experts"]["gate"]["kernel"].shape == (E, D, 6)
    assert set(params["router"]) == {"kernel", "bias"}


def test_a_balance_bias_is_a_collection_of_its_own(x):
    module = to_linen(LAYERS_OF_USERS["biased"])
    variables = variables_of(module, x)
    assert set(traverse_util.flatten_dict(variables["balance"])) == {("router", "balance_bias")}
    assert "balance_bias" not in variables["params"]["router"]
    with pytest.raises(ValueError, match="lack \\['balance/router/balance_bias'\\]"):
        module.apply({"params": variables["params"]}, x)


def test_param_dtype(key, x):
    module = to_linen(LAYERS_OF_USERS["biased"], param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(module.init, key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    [bias] = jax.tree.leaves(variables["balance"])
    assert bias.dtype == jnp.float32


def test_mask_and_noise(key, x):
    router = moejax.jittered(moejax.linear(D, E), epsilon=0.5)
    layer = moejax.moe(moejax.linear(D, D), router, num_experts=E)
    module = to_linen(layer)
    variables = module.init(key, x)
    params = pure_params(layer, variables)
    mask = np.arange(T // 2)[None] < np.array([[3], [7]])
    same(
        module.apply(variables, x, mask=mask, key=key),
        layer.apply(params, x, mask=mask, key=key),
    )
    same(module.apply(variables, x), layer.apply(params, x))
    drawn = module.apply(variables, x, rngs={"routing": key})[0]
    same(drawn, module.apply(variables, x, rngs={"routing": key})[0])
    assert not jnp.array_equal(drawn, module.apply(variables, x)[0])


class Block(linen.Module):
    """One layer of a deep model."""

    @linen.compact
    def __call__(self, x):
        return to_linen(ROUTED, axes=expert_axes)(x)


def lifted(lift):
    class Deep(linen.Module):
        @linen.compact
        def __call__(self, x):
            return lift(Block)()(x)

    return Deep()


def test_scan_and_its_axes(x):
    def lift(block):
        metadata = {linen.PARTITION_NAME: "layers"}
        return linen.scan(
            linen.remat(block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params=metadata,
        )

    model = lifted(lift)
    boxed = variables_of(model, x)
    variables = linen.meta.unbox(boxed)
    [params] = jax.tree.leaves(variables, is_leaf=lambda node: "experts" in node)
    pure = jax.jit(lambda params, x: jax.lax.scan(lambda x, own: ROUTED.apply(own, x), x, params))
    same(jax.jit(model.apply)(boxed, x), pure(params, x))
    specs = by_name(linen.get_partition_spec(boxed))
    [kernel] = [spec for name, spec in specs.items() if name.endswith("experts/gate/kernel")]
    assert kernel == jax.P("layers", "expert", None, None)


def test_vmap(x):
    def lift(block):
        return linen.vmap(
            block,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=LAYERS,
            metadata_params={linen.PARTITION_NAME: None},
        )

    model = lifted(lift)
    variables = linen.meta.unbox(variables_of(model, x))
    [params] = jax.tree.leaves(variables, is_leaf=lambda node: "experts" in node)
    pure = jax.jit(jax.vmap(ROUTED.apply, in_axes=(0, None)))
    same(jax.jit(model.apply)(variables, x), pure(params, x))


def test_tabulate(key, x):
    table = to_linen(LAYERS_OF_USERS["moe with a list of params"]).tabulate(key, x)
    assert "LinenLayer" in table
    assert "kernel" in table


def test_on_a_mesh(mesh, key, x):
    layer = on_mesh(mesh)
    module = to_linen(layer, axes=expert_axes)
    specs = linen.get_partition_spec(jax.eval_shape(module.init, key, x))
    places = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        variables = linen.meta.unbox(jax.jit(module.init, out_shardings=places)(key, x))
        y, routing = jax.jit(module.apply)(variables, x)
    kernel = variables["params"]["experts"]["gate"]["kernel"]
    assert kernel.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P("expert", None, None)), kernel.ndim
    )
    assert variables["params"]["router"]["kernel"].sharding.is_fully_replicated
    expected, decision = jax.jit(ROUTED.apply)(jax.device_get(variables["params"]), x)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(routing.experts, decision.experts)
