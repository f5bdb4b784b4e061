"""Checkpoint folders: written by transformers and read here, and the other way round."""

import json
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moejax.interop import torch as conversion
from moejax.interop import transformers as published
from pages import code_of
from transformers_cases import CASES, D, E, F, config_of

if os.environ.get("MOEJAX_REQUIRE_TORCH") == "1":
    import torch
    import transformers
else:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODEL = {
    "vocab_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
}


def model_of(name, dtype=torch.float32, **fields):
    case = CASES[name]
    class_name, more = FAMILIES[name]
    config = type(config_of(case))(**{**case.fields, **MODEL, **more, **fields})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config).to(dtype).eval()


def block_of(model):
    return model.model.layers[1].mlp


def assert_is_the_block(folder, module, dtype=jnp.float32):
    layer, _ = published.block(folder)
    params = published.load(folder, 1)
    x = np.random.default_rng(0).normal(size=(1, 5, 6)).astype(np.float32)
    expected = module(torch.from_numpy(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    y = layer.apply(params, jnp.asarray(x, dtype))[0]
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    return params


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_transformers_is_read_and_written_back(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    params = assert_is_the_block(tmp_path, block_of(model))
    changed = jax.tree.map(lambda leaf: 2 * leaf, params)
    published.save(tmp_path, 1, changed)
    jax.tree.map(np.testing.assert_array_equal, published.load(tmp_path, 1), changed)
    jax.tree.map(
        np.testing.assert_array_equal, published.load(tmp_path, 0), _unchanged(model, tmp_path)
    )
    again = type(model).from_pretrained(tmp_path)
    again.config._experts_implementation = "eager"
    assert_is_the_block(tmp_path, block_of(again))
    assert not list(tmp_path.glob("*.partial"))


def _unchanged(model, folder):
    _, layout = published.block(folder)
    return conversion.from_torch(layout, model.model.layers[0].mlp.state_dict())


def test_a_disk_that_fills_up_leaves_every_file_as_it_was(tmp_path, monkeypatch):
    model_of("mixtral").save_pretrained(tmp_path, max_shard_size="1KB")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    changed = jax.tree.map(lambda leaf: 2 * leaf, published.load(tmp_path, 1))
    written = []

    def room_for_one(arrays, path, **options):
        if written:
            raise OSError("no space left")
        save_file(arrays, path, **options)
        written.append(path)

    save_file = safetensors.numpy.save_file
    monkeypatch.setattr(safetensors.numpy, "save_file", room_for_one)
    with pytest.raises(OSError, match="no space left"):
        published.save(tmp_path, 1, changed)
    assert written
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_several_shards_and_bfloat16(tmp_path):
    model = model_of("mixtral", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    params = published.load(tmp_path, 1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    expected = block_of(model).experts.down_proj.detach().float().numpy()
    kernel = np.asarray(params["experts"]["down"]["kernel"], np.float32)
    np.testing.assert_array_equal(kernel.transpose(0, 2, 1), expected)
    published.save(tmp_path, 1, params)
    jax.tree.map(np.testing.assert_array_equal, published.load(tmp_path, 1), params)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_code_of_the_page_runs(tmp_path, standard_promotion):
    model_of("mixtral", torch.bfloat16, num_hidden_layers=4).save_pretrained(tmp_path)
    before = published.load(tmp_path, 3)
    names = {"folder": tmp_path, "x": np.ones((2, 5, D), np.float32), "D": D, "E": E, "F": F}
    exec(code_of("transformers.md"), names)
    assert names["y"].shape == (2, 5, D)
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), before)
    for params in (names["params"], published.load(tmp_path, 3)):
        jax.tree.map(partial(np.testing.assert_array_equal, strict=True), params, in_float32)


def test_what_is_not_there_is_named(tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Layer 7 must hold a block of this model"):
        published.load(tmp_path, 7)
    with pytest.raises(ValueError, match="must hold a block"):
        published.load(tmp_path, 1, prefix="model.layers.1.nothing")
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match=r"`quantization_config` .* got 'fp8'"):
        published.load(tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing \['model.safetensors'\]"):
        published.load(tmp_path, 1)


def test_fields_that_the_folder_leaves_out_come_from_a_configuration(tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    expected = published.load(tmp_path, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have the field `num_experts_per_tok`"):
        published.load(tmp_path, 1)
    params = published.load(tmp_path, 1, config=model.config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    published.save(tmp_path, 1, jax.tree.map(lambda leaf: 2 * leaf, params), config=model.config)
    doubled = published.load(tmp_path, 1, config=model.config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, params)


@pytest.mark.parametrize(
    ("changes", "tensor", "expected", "got"),
    [
        ({"num_local_experts": 4}, "gate.weight", [4, 6], [8, 6]),
        ({"num_local_experts": 9}, "gate.weight", [9, 6], [8, 6]),
        ({"intermediate_size": 7}, "experts.0.w2.weight", [6, 7], [6, 5]),
    ],
)
def test_another_shape_is_named(changes, tensor, expected, got, tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    config = {**model.config.to_dict(), **changes}
    message = f"layers.1.*{tensor}` must have the shape .*, {expected}, got {got}".replace(
        "[", r"\["
    )
    for prefix in (None, "model.layers.1.block_sparse_moe"):
        with pytest.raises(ValueError, match=message):
            published.load(tmp_path, 1, config=config, prefix=prefix)
    with pytest.raises(ValueError, match="Layer 7 must hold a block of this model"):
        published.load(tmp_path, 7, config=config)


def written(name, folder, start):
    """A file with the block of a family, named as in checkpoints, in a model of several modules."""
    from safetensors.numpy import save_file

    config = config_of(CASES[name])
    layer, _ = published.block(config)
    state = conversion.to_torch(published.published(config), layer.init(jax.random.key(0)))
    others = {f"model.layers.1.{name}.weight": np.ones(2) for name in ("norm", "self_attn.q_proj")}
    save_file({**others, **{start + key: value for key, value in state.items()}},
              folder / "model.safetensors")  # fmt: skip
    return config.to_dict()


@pytest.mark.parametrize("name", CASES)
def test_the_block_of_every_family_is_all_that_its_module_has(name, tmp_path):
    start = "model.layers.1." if name == "granitemoeshared" else "model.layers.1.mlp."
    config = written(name, tmp_path, start)
    params = published.load(tmp_path, 1, config=config)
    published.save(tmp_path, 1, params, config=config)


@pytest.mark.parametrize(
    ("name", "without", "left_out"),
    [
        ("lfm2_moe", {"use_expert_bias": False}, r"\['model.layers.1.mlp.expert_bias'\] and 0"),
        ("cohere2_moe", {"num_shared_experts": 0}, "mlp.shared_experts.down_proj.weight"),
    ],
)  # fmt: skip
def test_a_configuration_that_leaves_tensors_out_is_refused(name, without, left_out, tmp_path):
    config = {**written(name, tmp_path, "model.layers.1.mlp."), **without}
    with pytest.raises(ValueError, match=f"only tensors that follow .*{left_out}"):
        published.load(tmp_path, 1, config=config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "is not a file of JSON"),
        ("config.json", "[]", "must hold a JSON object, got a list"),
        ("model.safetensors.index.json", "{", "is not a file of JSON"),
        ("model.safetensors.index.json", "{}", "must have a `weight_map`"),
        ("model.safetensors", "", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    config_of(CASES["mixtral"]).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}\b.* {message}"):
        published.load(tmp_path, 0)
