"""From a configuration to a block: the one table of the model types that published files name."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from moejax.base import Layer, Schedule
from moejax.interop.torch import Layout
from moejax.interop.transformers.afmoe import afmoe
from moejax.interop.transformers.aria import aria_text
from moejax.interop.transformers.cohere2 import cohere2_moe
from moejax.interop.transformers.dbrx import dbrx
from moejax.interop.transformers.deepseek_v2 import deepseek_v2
from moejax.interop.transformers.deepseek_v3 import deepseek_v3, exaone_moe, mistral4
from moejax.interop.transformers.deepseek_v4 import deepseek_v4
from moejax.interop.transformers.ernie import ernie4_5_moe
from moejax.interop.transformers.fields import as_dict
from moejax.interop.transformers.flint import flint
from moejax.interop.transformers.gpt_oss import gpt_oss
from moejax.interop.transformers.granite import granitemoe, granitemoeshared
from moejax.interop.transformers.hunyuan import hunyuan_v1_moe
from moejax.interop.transformers.jamba import jamba
from moejax.interop.transformers.laguna import laguna
from moejax.interop.transformers.lfm2 import lfm2_moe
from moejax.interop.transformers.llama4 import llama4_text
from moejax.interop.transformers.minimax_m2 import minimax_m2
from moejax.interop.transformers.mixtral import mixtral
from moejax.interop.transformers.olmo import olmoe
from moejax.interop.transformers.phimoe import phimoe
from moejax.interop.transformers.pieces import Block
from moejax.interop.transformers.qwen import qwen2_moe, qwen3_5_moe, qwen3_moe, qwen3_vl_moe
from moejax.interop.transformers.switch import switch_transformers

FAMILIES = MappingProxyType(
    {
        "afmoe": afmoe,
        "aria_text": aria_text,
        "cohere2_moe": cohere2_moe,
        "dbrx": dbrx,
        "deepseek_v2": deepseek_v2,
        "deepseek_v3": deepseek_v3,
        "deepseek_v4": deepseek_v4,
        "dots1": deepseek_v3,
        "ernie4_5_moe": ernie4_5_moe,
        "exaone_moe": exaone_moe,
        "flex_olmo": olmoe,
        "flint": flint,
        "glm4_moe": deepseek_v3,
        "gpt_oss": gpt_oss,
        "granitemoe": granitemoe,
        "granitemoeshared": granitemoeshared,
        "hunyuan_v1_moe": hunyuan_v1_moe,
        "jamba": jamba,
        "laguna": laguna,
        "lfm2_moe": lfm2_moe,
        "llama4_text": llama4_text,
        "mellum": qwen3_moe,
        "minimax": mixtral,
        "minimax_m2": minimax_m2,
        "mistral4": mistral4,
        "mixtral": mixtral,
        "olmoe": olmoe,
        "phimoe": phimoe,
        "qwen2_moe": qwen2_moe,
        "qwen3_5_moe_text": qwen3_5_moe,
        "qwen3_moe": qwen3_moe,
        "qwen3_next": qwen2_moe,
        "qwen3_vl_moe_text": qwen3_vl_moe,
        "solar_open": deepseek_v3,
        "switch_transformers": switch_transformers,
    }
)


def block(config: Any, *, execute: Schedule | None = None) -> tuple[Layer, Layout]:
    """The sparse block of a published model, and where its weights lie.

    Args:
        config: a configuration object of transformers, its dict, or the path of a ``config.json``
            or of its folder. For a model with several parts, this means its text model.
        execute: the schedule, as in `moe`; by default `dropless`.

    Returns:
        The layer, a `moe` alone or beside a shared expert, and the layout of the module's
        ``state_dict`` in the installed transformers. ``from_torch(layout, module.state_dict())`` of
        ``moejax.interop.torch`` gives the params, and ``layer.apply(params, x)[0]`` is the module's
        output in evaluation. A bias that chooses experts is among the params, as the
        ``"balance_bias"`` of `biased`; it has no gradient.

    Raises:
        ValueError: if the model, or the value of a field, is not supported; names it.

    Example:
        >>> layer, layout = block({
        ...     "model_type": "mixtral", "hidden_size": 4, "intermediate_size": 8,
        ...     "num_local_experts": 3, "num_experts_per_tok": 2, "hidden_act": "silu"})
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, jnp.ones((2, 5, 4)))[0].shape
        (2, 5, 4)
        >>> layout["experts"]["down"]["kernel"].key
        'experts.down_proj'

    References:
        Wolf et al., `Transformers <https://arxiv.org/abs/1910.03771>`_, 2020
    """
    found = build(config, execute=execute)
    return found.layer, found.layout


def published(config: Any) -> Layout:
    """The layout of the same params in the model's checkpoint, within the module of the mixture.

    Args:
        config: as for `block`.

    Returns:
        A layout; most models have a tensor per expert, such as Mixtral's ``experts.{}.w1.weight``.

    Raises:
        ValueError: as for `block`.

    Example:
        >>> layout = published({
        ...     "model_type": "mixtral", "hidden_size": 4, "intermediate_size": 8,
        ...     "num_local_experts": 3, "num_experts_per_tok": 2, "hidden_act": "silu"})
        >>> layout["experts"]["gate"]["kernel"].key
        'experts.{}.w1.weight'
    """
    return build(config).published


def build(config: Any, *, execute: Schedule | None = None) -> Block:
    """The block with both layouts."""
    fields = as_dict(config)
    if fields.get("model_type") not in FAMILIES and "text_config" in fields:
        fields = as_dict(fields["text_config"])
    model_type = fields.get("model_type", "")
    if model_type not in FAMILIES:
        raise ValueError(
            f"`model_type` must be one of {sorted(FAMILIES)}, got {model_type!r}: compose the "
            "layer of moejax's functions, as the files of moejax.interop.transformers do."
        )
    return FAMILIES[model_type](fields, execute=execute)
