"""Published blocks against the modules of the installed transformers, with random weights."""

import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import params_of
from moejax.interop import torch as conversion
from moejax.interop import transformers as published
from moejax.interop.transformers.fields import ACTIVATIONS
from pages import blocks_of
from transformers_cases import CASES, D, config_of, module_of

if os.environ.get("MOEJAX_REQUIRE_TORCH") == "1":
    import torch
    import transformers
else:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = (2, 16, D)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 4 * 2**-8}


@pytest.fixture
def in_double(name, monkeypatch):
    """Modules route in float32 whatever their weights are: let that be float64, to compare.

    What transformers and safetensors import at the first use must have been imported before: their
    tables of dtypes would keep the wrong one for all tests to come.
    """
    importlib.import_module("safetensors.torch")
    module_of(CASES[name], config_of(CASES[name]), torch.float32)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def inputs(dtype):
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(size=(2, *SHAPE))
    return [jnp.asarray(array).astype(dtype) for array in (x, cotangent)]


def numpy_of(tensor):
    return (
        tensor.detach().to(torch.float64 if tensor.dtype != torch.bfloat16 else torch.float).numpy()
    )


def outputs_of_module(module, x, cotangent):
    """The output, the gradient of x, and those of the parameters by their names."""
    dtype = next(module.parameters()).dtype
    to_torch = lambda array: torch.from_numpy(np.array(array, np.float64)).to(dtype)  # noqa: E731
    x = to_torch(x).requires_grad_()
    output = module(x)
    y = output[0] if isinstance(output, tuple) else output
    y = y.reshape(x.shape)
    (y * to_torch(cotangent)).sum().backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in {
            **dict(module.named_buffers()),
            **dict(module.named_parameters()),
        }.items()
    }
    return y, x.grad, gradients


def error_within(actual, expected, tolerance):
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    scale = max(np.abs(expected).max(), 1e-30)
    error = float(np.abs(actual - expected).max() / scale)
    assert error <= tolerance, error
    return error


def compare(case, dtype, execute=moejax.dense):
    """The largest error, of outputs and of all gradients, relative to the scale of each."""
    config = config_of(case)
    module = module_of(case, config, getattr(torch, dtype))
    layer, layout = published.block(config, execute=execute)
    params = conversion.from_torch(layout, module.state_dict())
    x, cotangent = inputs(dtype)

    def scalar(params, x):
        y = layer.apply(params, x)[0]
        return jnp.sum(y * cotangent, dtype=y.dtype), y

    (_, y), (to_params, to_x) = jax.value_and_grad(scalar, (0, 1), has_aux=True)(params, x)
    expected, expected_to_x, gradients = outputs_of_module(module, x, cotangent)
    errors = [
        error_within(y, numpy_of(expected), TOLERANCE[dtype]),
        error_within(to_x, numpy_of(expected_to_x), TOLERANCE[dtype]),
    ]
    expected_params = conversion.from_torch(layout, gradients)
    jax.tree.map(
        lambda a, b: errors.append(error_within(a, np.asarray(b, np.float64), TOLERANCE[dtype])),
        to_params,
        expected_params,
    )
    return max(errors)


@pytest.mark.parametrize("name", CASES)
def test_block_in_float64(name, x64, in_double, record_property):
    record_property("error", compare(CASES[name], "float64"))


@pytest.mark.parametrize("name", CASES)
def test_block_in_float32(name):
    compare(CASES[name], "float32")


VARIANTS = {
    "cohere2_moe": {"expert_selection_fn": "softmax"},
    "deepseek_v2": {"mlp_bias": True},
    "deepseek_v3": {"norm_topk_prob": False},
    "ernie4_5_moe": {"use_bias": True},
    "laguna": {"moe_router_logit_softcapping": 0.0},
    "lfm2_moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": True},
    "switch_transformers": {"router_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_block_with_another_field(name):
    case = CASES[name]
    compare(case._replace(fields={**case.fields, **VARIANTS[name]}), "float32")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "switch_transformers"])
def test_block_by_its_default_schedule(name):
    compare(CASES[name], "float32", execute=None)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_block_in_bfloat16(name):
    """Both round every step: each is as far from the block in float64 as bfloat16 allows."""
    case = CASES[name]
    config = config_of(case)
    module = module_of(case, config, torch.bfloat16)
    layer, layout = published.block(config, execute=moejax.dense)
    params = conversion.from_torch(layout, module.state_dict())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    x, cotangent = inputs(jnp.bfloat16)
    y, routing = layer.apply(params, x)
    expected, _, _ = outputs_of_module(module, x, cotangent)
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float32) - numpy_of(expected))
    # A token whose experts are nearly tied may go elsewhere: those that do not are close.
    same = error.max(axis=-1) <= TOLERANCE["bfloat16"] * np.abs(numpy_of(expected)).max()
    assert same.mean() > 0.9
    assert routing.weights.dtype == jnp.float32


def test_switch_limits_each_sequence(key):
    layer, _ = published.block(config_of(CASES["switch_transformers"]))
    params, (x, _) = params_of(layer), inputs(jnp.float32)
    mask = jnp.asarray(np.arange(x.shape[1]) < np.array([[3], [16]]))
    y, routing = layer.apply(params, x, key=key, mask=mask)
    for one, expected, masked in zip(x, y, mask, strict=True):
        alone = layer.apply(params, one[None], mask=masked[None])[0][0]
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
    assert routing.experts.shape == (*x.shape[:2], 1)
    assert not y[0, 3:].any()
    np.testing.assert_array_equal(layer.apply(params, x, key=key)[0], layer.apply(params, x)[0])
    for wrong in (x[0], x[None]):
        with pytest.raises(
            ValueError, match=r"must be \[sequences, tokens, D\], got \[.*\]: the ca"
        ):
            layer.apply(params, wrong)


def test_a_layer_composed_by_hand_takes_the_params_of_the_block():
    """So that it can have what the block leaves out, as docs/transformers.md says of `jittered`."""
    [code] = [one for one in blocks_of("transformers.md", "python") if "jittery" in one]
    config, (x, _) = config_of(CASES["mixtral"]), inputs(jnp.float32)
    config.num_experts_per_tok = 2
    layer, _ = published.block(config)
    params = params_of(layer)
    names = {"moejax": moejax, "jax": jax, "functools": functools, "params": params, "x": x}
    exec(code, names | {"D": D, "E": 8, "F": 5}, outcome := {})
    expected = layer.apply(params, x)[0]
    np.testing.assert_allclose(outcome["jittery"].apply(params, x)[0], expected, rtol=1e-5)
    assert not np.array_equal(outcome["y"], expected)


SMALL = {
    "model_type": "mixtral",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}


def fields(name, **changes):
    return {**config_of(CASES[name]).to_dict(), **changes}


TWO_NORM = {**fields("dbrx")["ffn_config"], "moe_normalize_expert_weights": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SMALL, "model_type": "bert"}, "`model_type` must be one of .*, got 'bert'"),
        ({}, "`model_type` must be one of"),
        ({**SMALL, "hidden_act": "xielu"}, "The field `hidden_act` of `mixtral` .*, got 'xielu'"),
        ({**SMALL, "num_experts_per_tok": 1}, "`num_experts_per_tok` .* be at least 2"),
        ({**SMALL, "num_experts_per_tok": 5}, "`num_experts_per_tok` .* at most .* 4, got 5"),
        ({**SMALL, "hidden_size": [4]}, "`hidden_size` .* a positive integer, got \\[4\\]"),
        ({k: v for k, v in SMALL.items() if k != "hidden_act"}, "have the field `hidden_act`"),
        (fields("deepseek_v2", topk_method="noaux_tc"), "`topk_method` .* got 'noaux_tc'"),
        (fields("deepseek_v2", norm_topk_prob=True), "`norm_topk_prob` .* got True"),
        (fields("deepseek_v3", n_group=3), "`n_group` .* divide 8 experts into groups"),
        (fields("deepseek_v3", n_group=8), "`n_group` .* groups of two or more, got 8"),
        (fields("deepseek_v4", scoring_func="sigmoid"), "`scoring_func` .* 'sqrtsoftplus', got"),
        (fields("dbrx", ffn_config=TWO_NORM), "`moe_normalize_expert_weights` .* got 2"),
        (fields("jamba", num_experts=1), "`num_experts` of `jamba` must be at least 2"),
        (fields("cohere2_moe", shared_expert_combination_strategy="average"), "got 'average'"),
        (fields("ernie4_5_moe", moe_norm_min=0.1), "`moe_norm_min` .* at most 1e-9, got 0.1"),
        (fields("laguna", moe_apply_router_weight_on_input=True), "`moe_apply_router_w"),
        (fields("phimoe", num_experts_per_tok=1), "`num_experts_per_tok` of `phimoe` must be 2"),
        (fields("hunyuan_v1_moe", moe_topk=[1, 2]), "`moe_topk` .* got \\[1, 2\\]"),
        (fields("switch_transformers", router_dtype="bfloat16"), "`router_dtype` .* 'bfloat16'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_its_field(config, message):
    with pytest.raises(ValueError, match=message):
        published.block(config)


def test_a_number_for_each_layer_is_one_where_all_are_equal():
    listed = fields("hunyuan_v1_moe", moe_topk=[2, 2, 2], num_experts=[4, 4, 4])
    layer, layout = published.block(listed)
    assert (layer, layout) == published.block(listed | {"moe_topk": 2, "num_experts": 4})


def test_a_configuration_may_be_of_three_kinds(tmp_path):
    config = config_of(CASES["mixtral"])
    config.save_pretrained(tmp_path)
    layouts = [
        published.block(one)[1]
        for one in (config, config.to_dict(), tmp_path, tmp_path / "config.json")
    ]
    assert all(layout == layouts[0] for layout in layouts)
    with pytest.raises(ValueError, match="a configuration object of transformers, a dict, or"):
        published.block(3)


def test_the_text_model_is_meant():
    config = config_of(CASES["qwen3_vl_moe"]).to_dict()
    whole = {"model_type": "qwen3_vl_moe", "text_config": config}
    assert published.block(whole)[1] == published.block(config)[1]


@pytest.mark.parametrize("name", CASES)
def test_both_layouts_hold_every_parameter(name):
    config = config_of(CASES[name])
    layer, layout = published.block(config)
    params = jax.tree.map(np.asarray, params_of(layer))
    for one in (layout, published.published(config)):
        back = conversion.from_torch(one, conversion.to_torch(one, params))
        jax.tree.map(np.testing.assert_array_equal, back, params)


CHOSEN_BY_BIAS = ["minimax_m2", "deepseek_v3", "deepseek_v4", "afmoe", "lfm2_moe", "ernie4_5_moe"]


@pytest.mark.parametrize("name", CHOSEN_BY_BIAS)
def test_a_bias_that_chooses_is_found_by_the_name_of_every_balance_bias(name, key):
    config = config_of(CASES[name])
    layer, layout = published.block(config)
    router_of = lambda tree: tree.get("routed", tree)["router"]  # noqa: E731
    for tree in (jax.eval_shape(layer.init, key), layout, published.published(config)):
        assert set(router_of(tree)) == {"router", "balance_bias"}
    bias = jax.jit(lambda key: router_of(layer.init(key))["balance_bias"])(key)
    assert bias.dtype == jnp.float32
    assert not bias.any()


def test_every_family_has_a_case():
    tested = {config_of(case).model_type for case in CASES.values()}
    assert tested == set(published.FAMILIES)


def test_transformers_is_not_imported():
    import subprocess
    import sys

    code = (
        "import sys, moejax; moejax.interop.transformers.block;"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
