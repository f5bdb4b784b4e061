"""Mixtures of experts in JAX: ``y = sum_e g_e(x) E_e(x)``, and faster schedules of the same sum."""

from moejax.diagnostics import (
    confidence,
    dead_experts,
    effective_experts,
    expert_by_class,
    expert_load,
    gate_entropy,
    mutual_information,
)
from moejax.execution import dense, dropless, mixture
from moejax.experts import fan_in_uniform, glu, linear, mlp, stack
from moejax.layer import moe
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
from moejax.routers import cosine, noisy, slots
from moejax.routing import (
    expert_choice,
    gshard_top_2,
    hashed,
    mask_tokens,
    noisy_top_k,
    relu,
    sigmoid_top_k,
    sinkhorn,
    soft_slots,
    softmax,
    switch,
    top_k,
    update_balance_bias,
    update_l1_coefficient,
)
from moejax.slot_execution import gather_slots, mix_slots
from moejax.transforms import jittered, soft_capped, tempered
from moejax.types import ExpertChoice, Layer, Routing, SoftSlots

__version__ = "0.1.0"

__all__ = [
    "ExpertChoice",
    "Layer",
    "Routing",
    "SoftSlots",
    "bernoulli_log_likelihood",
    "categorical_log_likelihood",
    "confidence",
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
    "gather_slots",
    "gaussian_log_likelihood",
    "glu",
    "gshard_top_2",
    "hashed",
    "importance_loss",
    "jittered",
    "l1_loss",
    "linear",
    "load_balancing_loss",
    "load_loss",
    "mask_tokens",
    "mix_slots",
    "mixture",
    "mixture_nll",
    "mlp",
    "moe",
    "mutual_information",
    "mutual_information_loss",
    "noisy",
    "noisy_top_k",
    "relu",
    "router_z_loss",
    "sigmoid_top_k",
    "sinkhorn",
    "slots",
    "soft_capped",
    "soft_slots",
    "softmax",
    "stack",
    "switch",
    "tempered",
    "top_k",
    "update_balance_bias",
    "update_l1_coefficient",
]
