"""The page about Flax, Equinox and Haiku: its code runs, and is the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pages import code_of


@pytest.fixture(scope="module")
def names():
    """What the page defines on the way to its recipes."""
    names: dict = {}
    exec(code_of("flax.md"), names)
    return names


def test_flax(names):
    x = names["x"]
    assert names["y"].shape == (2, 5, 16)
    assert names["bias"].any()
    same(names["loaded"].as_params(), names["params"])
    same(names["to_linen"](names["layer"]).apply(names["variables"], x), names["loaded"](x))
    gradients = names["gradients"](names["model"], x)
    assert gradients["moe"]["experts"]["gate"]["kernel"].shape == (8, 16, 32)
    kernel = names["module"].experts.gate.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 32)


@pytest.fixture
def recipe(names):
    """The layer without a mesh, and the page's other names."""
    import moejax

    layer = moejax.moe(moejax.glu(16, 32), moejax.linear(16, 8), num_experts=8)
    return {**names, "layer": layer}


def same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_equinox(recipe, key):
    eqx = pytest.importorskip("equinox")
    exec(code_of("flax.md", "equinox"), recipe)
    layer, x, model = recipe["layer"], recipe["x"], recipe["mixture"]
    params = layer.init(key)
    loss_and = lambda result: (jnp.sum(result[0] ** 2), result)  # noqa: E731
    gradient = eqx.filter_grad(lambda model: loss_and(model(x)), has_aux=True)
    gradients, result = eqx.filter_jit(gradient)(model)
    pure = jax.grad(lambda params: loss_and(layer.apply(params, x)), has_aux=True)
    expected, expected_result = jax.jit(pure)(params)
    same(result, expected_result)
    same(gradients.params, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_haiku(recipe):
    pytest.importorskip("haiku")
    exec(code_of("flax.md", "haiku"), recipe)
    layer, x = recipe["layer"], recipe["x"]
    params = recipe["haiku_params"]["haiku_mixture"]
    like = jax.eval_shape(layer.init, jax.random.key(0))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(like)
    ]
    own = jax.tree.unflatten(jax.tree.structure(like), [params[path] for path in paths])
    apply = jax.jit(recipe["network"].apply)
    same(apply(recipe["haiku_params"], None, x), jax.jit(layer.apply)(own, x))
