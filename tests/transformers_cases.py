"""The table of published blocks: a new family is one line here."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """A configuration and the module that is its oracle.

    Attributes:
        module: ``package.Class`` below transformers.models.
        config: class of its configuration.
        fields: what the configuration is made of, small.
        special: what is special about the family, for the documentation.
        options: keyword arguments of the module besides the configuration.
    """

    module: str
    config: str
    fields: dict
    special: str
    options: dict = {}  # noqa: RUF012


D, F, E, K = 6, 5, 8, 3
MOST = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
LOCAL = {"hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": K}
ROUTED = {
    "hidden_size": D,
    "moe_intermediate_size": F,
    "n_routed_experts": E,
    "n_shared_experts": 2,
    "num_experts_per_tok": K,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
SHARED = {"shared_expert_intermediate_size": 7}

CASES = {
    "mixtral": Case(
        "mixtral.MixtralSparseMoeBlock", "MixtralConfig", LOCAL, "weights divided by their sum"
    ),
    "minimax": Case("minimax.MiniMaxSparseMoeBlock", "MiniMaxConfig", LOCAL, "as Mixtral"),
    "minimax_m2": Case(
        "minimax_m2.MiniMaxM2SparseMoeBlock",
        "MiniMaxM2Config",
        LOCAL,
        "a sigmoid; a bias chooses",
    ),
    "qwen2_moe": Case(
        "qwen2_moe.Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {**MOST, **SHARED, "norm_topk_prob": False},
        "raw weights; a shared expert behind its gate",
    ),
    "qwen3_moe": Case(
        "qwen3_moe.Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {**MOST, "norm_topk_prob": True},
        "as Mixtral",
    ),
    "qwen3_next": Case(
        "qwen3_next.Qwen3NextSparseMoeBlock",
        "Qwen3NextConfig",
        {**MOST, **SHARED, "norm_topk_prob": True},
        "a shared expert behind its gate",
    ),
    "qwen3_5_moe": Case(
        "qwen3_5_moe.Qwen3_5MoeSparseMoeBlock",
        "Qwen3_5MoeTextConfig",
        {**MOST, **SHARED},
        "a shared expert behind its gate",
    ),
    "qwen3_vl_moe": Case(
        "qwen3_vl_moe.Qwen3VLMoeTextSparseMoeBlock",
        "Qwen3VLMoeTextConfig",
        MOST,
        "as Mixtral; checkpoints are transposed",
    ),
    "olmoe": Case(
        "olmoe.OlmoeSparseMoeBlock",
        "OlmoeConfig",
        {**MOST, "intermediate_size": F, "norm_topk_prob": False},
        "raw weights",
    ),
    "flex_olmo": Case(
        "flex_olmo.FlexOlmoSparseMoeBlock",
        "FlexOlmoConfig",
        {**MOST, "intermediate_size": F, "norm_topk_prob": False},
        "raw weights",
    ),
    "jamba": Case(
        "jamba.JambaSparseMoeBlock",
        "JambaConfig",
        {**MOST, "intermediate_size": F},
        "raw weights",
    ),
    "granitemoe": Case(
        "granitemoe.GraniteMoeMoE", "GraniteMoeConfig", LOCAL, "a softmax over the chosen"
    ),
    "granitemoeshared": Case(
        "granitemoeshared.GraniteMoeSharedMoE+GraniteMoeSharedMLP",
        "GraniteMoeSharedConfig",
        {**LOCAL, "shared_intermediate_size": 7},
        "a shared layer beside the module",
    ),
    "dbrx": Case(
        "dbrx.DbrxFFN",
        "DbrxConfig",
        {
            "d_model": D,
            "ffn_config": {
                "hidden_size": D,
                "ffn_hidden_size": F,
                "moe_num_experts": E,
                "moe_top_k": K,
            },
        },
        "experts on top of each other in one matrix",
    ),
    "hunyuan_v1_moe": Case(
        "hunyuan_v1_moe.HunYuanMoEV1Moe",
        "HunYuanMoEV1Config",
        {"hidden_size": D, "intermediate_size": F, "num_experts": E, "moe_topk": K},
        "a shared expert",
        {"layer_idx": 0},
    ),
    "aria": Case(
        "aria.AriaTextMoELayer",
        "AriaTextConfig",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "moe_num_experts": E,
            "moe_topk": K,
            "moe_num_shared_experts": 2,
            "mlp_bias": True,
            "num_attention_heads": 2,
        },
        "shared experts; transposed kernels",
    ),
    "deepseek_v2": Case(
        "deepseek_v2.DeepseekV2Moe",
        "DeepseekV2Config",
        {**ROUTED, "topk_method": "greedy", "num_attention_heads": 2},
        "raw weights, scaled; shared experts",
    ),
    "deepseek_v2 with groups": Case(
        "deepseek_v2.DeepseekV2Moe",
        "DeepseekV2Config",
        {**ROUTED, "topk_method": "group_limited_greedy", "num_attention_heads": 2},
        "groups by their maximum",
    ),
    "deepseek_v3": Case(
        "deepseek_v3.DeepseekV3MoE",
        "DeepseekV3Config",
        ROUTED,
        "a sigmoid; a bias chooses; groups by their two best; shared experts",
    ),
    "deepseek_v4": Case(
        "deepseek_v4.DeepseekV4SparseMoeBlock",
        "DeepseekV4Config",
        {
            **ROUTED,
            "n_shared_experts": 1,
            "swiglu_limit": 0.7,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        },
        "the root of a softplus; clamped SwiGLU",
        {"layer_idx": 1},
    ),
    "glm4_moe": Case("glm4_moe.Glm4MoeMoE", "Glm4MoeConfig", ROUTED, "as DeepSeek-V3"),
    "dots1": Case("dots1.Dots1MoE", "Dots1Config", ROUTED, "as DeepSeek-V3"),
    "exaone_moe": Case(
        "exaone_moe.ExaoneMoeSparseMoEBlock",
        "ExaoneMoeConfig",
        {**ROUTED, "num_experts": E, "num_shared_experts": 2},
        "as DeepSeek-V3",
    ),
    "solar_open": Case("solar_open.SolarOpenMoE", "SolarOpenConfig", ROUTED, "as DeepSeek-V3"),
    "afmoe": Case(
        "afmoe.AfmoeSparseMoeBlock",
        "AfmoeConfig",
        {**MOST, "num_shared_experts": 2, "route_scale": 2.5},
        "a sigmoid; a bias chooses; shared experts",
    ),
    "cohere2_moe": Case(
        "cohere2_moe.Cohere2MoeSparseMoeBlock",
        "Cohere2MoeConfig",
        {
            **MOST,
            "intermediate_size": F,
            "num_shared_experts": 2,
            "expert_selection_fn": "sigmoid",
            "shared_expert_combination_strategy": "sum",
        },
        "a sigmoid, or a softmax over the chosen",
    ),
    "lfm2_moe": Case(
        "lfm2_moe.Lfm2MoeSparseMoeBlock",
        "Lfm2MoeConfig",
        {**MOST, "routed_scaling_factor": 1.5},
        "a sigmoid; a bias chooses; 1e-6 in the denominator",
    ),
    "ernie4_5_moe": Case(
        "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "moe_num_experts": E,
            "moe_k": K,
            "moe_num_shared_experts": 2,
        },
        "a softmax; a bias chooses; shared experts",
    ),
    "mistral4": Case(
        "mistral4.Mistral4MoE",
        "Mistral4Config",
        ROUTED,
        "a softmax; groups by their two best; a shared expert",
    ),
    "gpt_oss": Case(
        "gpt_oss.GptOssMLP",
        "GptOssConfig",
        {**LOCAL, "swiglu_limit": 0.7},
        "biases; clamped SwiGLU; gate and up interleaved",
    ),
    "llama4": Case(
        "llama4.Llama4TextMoe",
        "Llama4TextConfig",
        {**LOCAL, "num_experts_per_tok": 1},
        "the gate multiplies what the expert reads; a shared expert",
    ),
    "llama4 with two experts": Case(
        "llama4.Llama4TextMoe",
        "Llama4TextConfig",
        {**LOCAL, "num_experts_per_tok": 2},
        "the same with K = 2",
    ),
    "phimoe": Case(
        "phimoe.PhimoeSparseMoeBlock",
        "PhimoeConfig",
        {**LOCAL, "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
        "sparsemixer",
    ),
    "laguna": Case(
        "laguna.LagunaSparseMoeBlock",
        "LagunaConfig",
        {
            **MOST,
            **SHARED,
            "moe_router_logit_softcapping": 3.0,
            "moe_routed_scaling_factor": 2.5,
        },
        "capped logits; a sigmoid; a bias chooses; a shared expert",
    ),
    "flint": Case(
        "flint.FlintSparseMoeBlock", "FlintConfig", {**MOST, **SHARED}, "a sigmoid; a shared expert"
    ),
    "mellum": Case(
        "mellum.MellumSparseMoeBlock",
        "MellumConfig",
        {**MOST, "norm_topk_prob": True},
        "as Mixtral",
    ),
    "switch_transformers": Case(
        "switch_transformers.SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        {"d_model": D, "d_ff": F, "num_experts": 4, "expert_capacity": 2},
        "one expert; capacity per sequence",
    ),
}


def config_of(case):
    """The configuration object, with the plain loop over experts."""
    import transformers

    config = getattr(transformers, case.config, None) or _config_class(case)
    made = config(**case.fields)
    made._experts_implementation = "eager"
    return made


def _config_class(case):
    from importlib import import_module

    name = case.module.split(".")[0]
    return getattr(import_module(f"transformers.models.{name}.configuration_{name}"), case.config)


def module_of(case, config, dtype):
    """The published block with random weights: every parameter, and every bias that chooses."""
    from importlib import import_module

    import torch

    package, names = case.module.split(".")
    models = import_module(f"transformers.models.{package}.modeling_{package}")
    classes = [getattr(models, name) for name in names.split("+")]
    made = [one(config, **case.options) for one in classes]
    module = made[0] if len(made) == 1 else _beside(*made)
    rng = np.random.default_rng(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.from_numpy(0.6 * rng.normal(size=tuple(tensor.shape))).to(dtype)
    return module.to(dtype).eval()


def _beside(routed, shared):
    """Two modules of one layer, added up as the layer does."""
    import torch

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block_sparse_moe, self.shared_mlp = routed, shared

        def forward(self, x):
            return self.block_sparse_moe(x) + self.shared_mlp(x)

    return Both()
