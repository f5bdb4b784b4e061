"""Mixtures of experts in JAX: ``y = sum_e g_e(x) E_e(x)``, and faster schedules of the same sum."""

from moejax.types import Layer, Routing

__all__ = ["Layer", "Routing"]
