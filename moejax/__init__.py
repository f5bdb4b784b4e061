"""Mixtures of experts in JAX: ``y = sum_e g_e(x) E_e(x)``, and faster schedules of the same sum.

The modules `checkpoint`, `interop`, `plot`, `sharding` and `training` are imported at their first
use, such as ``moejax.training.train_step``. So are `adapters` (`interop.flax`), `conversion`
(`interop.torch`) and `weights` (`interop.safetensors`), the shorter names of three bridges.
"""

from importlib import import_module
from types import MappingProxyType, ModuleType

from moejax._version import VERSION
from moejax.base import DenseRouting, ExpertChoice, Layer, Routing, SoftSlots
from moejax.diagnostics import (
    confidence,
    dead_experts,
    effective_experts,
    expert_by_class,
    expert_load,
    gate_entropy,
    mutual_information,
    share_dropped,
)
from moejax.layers import between, fan_in_uniform, gated, glu, linear, mlp, stack
from moejax.likelihood import (
    bernoulli_log_likelihood,
    categorical_log_likelihood,
    gaussian_log_likelihood,
    mixture_nll,
)
from moejax.losses import (
    entropy_loss,
    importance_loss,
    l1_loss,
    load_balancing_loss,
    load_loss,
    mutual_information_loss,
    router_z_loss,
)
from moejax.mixed import Bank, constant_experts, copy_experts, moe_of, networks, zero_experts
from moejax.moe_layer import moe, outputs_of, with_shared
from moejax.routers import biased, cosine, jittered, noisy, slots, soft_capped, tempered
from moejax.rules import (
    by_choice,
    by_score,
    by_token,
    by_token_weight,
    by_weight,
    capacity_for,
    expert_choice,
    gshard_top_2,
    hashed,
    limit_capacity,
    noisy_top_k,
    relu,
    root_softplus,
    sigmoid_top_k,
    sinkhorn,
    soft_slots,
    softmax,
    sparsemixer,
    switch,
    top_k,
    top_p,
    update_balance_bias,
    update_l1_coefficient,
)
from moejax.rules.limit import mask_tokens, positions
from moejax.schedules.capacity import capacity
from moejax.schedules.dense import dense, mixture
from moejax.schedules.dropless import dropless
from moejax.schedules.grouped_matmul import grouped_matmul
from moejax.schedules.scale_inputs import scale_inputs
from moejax.schedules.slots import gather_slots, mix_slots
from moejax.surgery import grow, map_mixtures, merge, prune, take_experts, upcycle

__version__ = VERSION

# Imported at their first use: `import moejax` must stay light.
_MODULES = MappingProxyType(
    {
        "adapters": "moejax.interop.flax",
        "checkpoint": "moejax.checkpoint",
        "conversion": "moejax.interop.torch",
        "interop": "moejax.interop",
        "plot": "moejax.plot",
        "sharding": "moejax.sharding",
        "training": "moejax.training",
        "weights": "moejax.interop.safetensors",
    }
)

__all__ = [
    "Bank",
    "DenseRouting",
    "ExpertChoice",
    "Layer",
    "Routing",
    "SoftSlots",
    "bernoulli_log_likelihood",
    "between",
    "biased",
    "by_choice",
    "by_score",
    "by_token",
    "by_token_weight",
    "by_weight",
    "capacity",
    "capacity_for",
    "categorical_log_likelihood",
    "confidence",
    "constant_experts",
    "copy_experts",
    "cosine",
    "dead_experts",
    "dense",
    "dropless",
    "effective_experts",
    "entropy_loss",
    "expert_by_class",
    "expert_choice",
    "expert_load",
    "fan_in_uniform",
    "gate_entropy",
    "gated",
    "gather_slots",
    "gaussian_log_likelihood",
    "glu",
    "grouped_matmul",
    "grow",
    "gshard_top_2",
    "hashed",
    "importance_loss",
    "jittered",
    "l1_loss",
    "limit_capacity",
    "linear",
    "load_balancing_loss",
    "load_loss",
    "map_mixtures",
    "mask_tokens",
    "merge",
    "mix_slots",
    "mixture",
    "mixture_nll",
    "mlp",
    "moe",
    "moe_of",
    "mutual_information",
    "mutual_information_loss",
    "networks",
    "noisy",
    "noisy_top_k",
    "outputs_of",
    "positions",
    "prune",
    "relu",
    "root_softplus",
    "router_z_loss",
    "scale_inputs",
    "share_dropped",
    "sigmoid_top_k",
    "sinkhorn",
    "slots",
    "soft_capped",
    "soft_slots",
    "softmax",
    "sparsemixer",
    "stack",
    "switch",
    "take_experts",
    "tempered",
    "top_k",
    "top_p",
    "upcycle",
    "update_balance_bias",
    "update_l1_coefficient",
    "with_shared",
    "zero_experts",
]


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
