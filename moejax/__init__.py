"""Mixtures of experts in JAX: ``y = sum_e g_e(x) E_e(x)``, and faster schedules of the same sum."""

from moejax.capacity import capacity
from moejax.diagnostics import (
    confidence,
    dead_experts,
    effective_experts,
    expert_by_class,
    expert_load,
    gate_entropy,
    mutual_information,
)
from moejax.dropless import dropless
from moejax.execution import dense, mixture
from moejax.experts import fan_in_uniform, glu, linear, mlp, stack
from moejax.grouped_matmul import grouped_matmul
from moejax.layer import moe
from moejax.losses import importance_loss, load_balancing_loss, router_z_loss
from moejax.routers import noisy
from moejax.routing import noisy_top_k, softmax, switch, top_k
from moejax.types import Layer, Routing

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "Routing",
    "capacity",
    "confidence",
    "dead_experts",
    "dense",
    "dropless",
    "effective_experts",
    "expert_by_class",
    "expert_load",
    "fan_in_uniform",
    "gate_entropy",
    "glu",
    "grouped_matmul",
    "importance_loss",
    "linear",
    "load_balancing_loss",
    "mixture",
    "mlp",
    "moe",
    "mutual_information",
    "noisy",
    "noisy_top_k",
    "router_z_loss",
    "softmax",
    "stack",
    "switch",
    "top_k",
]
