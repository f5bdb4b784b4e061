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
from moejax.routers import noisy
from moejax.routing import (
    gshard_top_2,
    hashed,
    mask_tokens,
    noisy_top_k,
    relu,
    sigmoid_top_k,
    sinkhorn,
    softmax,
    switch,
    top_k,
    update_balance_bias,
    update_l1_coefficient,
)
from moejax.types import Layer, Routing

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "Routing",
    "bernoulli_log_likelihood",
    "categorical_log_likelihood",
    "confidence",
    "dead_experts",
    "dense",
    "dropless",
    "effective_experts",
    "entropy_loss",
    "expert_by_class",
    "expert_load",
    "fan_in_uniform",
    "gate_entropy",
    "gaussian_log_likelihood",
    "glu",
    "gshard_top_2",
    "hashed",
    "importance_loss",
    "l1_loss",
    "linear",
    "load_balancing_loss",
    "load_loss",
    "mask_tokens",
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
    "softmax",
    "stack",
    "switch",
    "top_k",
    "update_balance_bias",
    "update_l1_coefficient",
]
