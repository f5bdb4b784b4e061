"""Ways to balance the experts of a layer: what each adds to the loss, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax

K, EXPERTS = 2, 8
RATE = 1e-3  # of the balance bias


class Method(NamedTuple):
    """A rule, and how its experts are kept balanced.

    Attributes:
        rule: ``memory -> rule``.
        memory: what the method keeps beside the parameters, before the first step.
        penalty: ``(decision, memory) -> scalar``, added to the cross-entropy.
        update: ``(memory, decision) -> memory`` of the next step.
        chosen: ``decision -> booleans [N, E]``, which image goes to which expert.
        schedule: for `moejax.moe`, where it is not the default.
    """

    rule: Callable[[Any], Callable[..., Any]]
    memory: Any = ()
    penalty: Callable[[Any, Any], jax.Array] = lambda decision, memory: jnp.zeros(())
    update: Callable[[Any, Any], Any] = lambda memory, decision: memory
    chosen: Callable[[Any], jax.Array] = lambda decision: decision.gates > 0
    schedule: Callable[..., jax.Array] | None = None


def top_2(memory: Any) -> Callable[..., Any]:
    """Softmax and two experts per image."""
    return partial(moejax.top_k, k=K)


def with_loss(weight: float, loss: Callable[[Any], jax.Array]) -> Method:
    """Top-2 with a loss of the decision."""
    return Method(top_2, penalty=lambda decision, memory: weight * loss(decision))


def controlled(first: float, factor: float) -> Method:
    """ReLU, with a load balancing loss whose coefficient holds two experts per image."""
    return Method(
        lambda coefficient: moejax.relu,
        memory=jnp.float32(first),
        penalty=lambda decision, coefficient: coefficient * moejax.load_balancing_loss(decision),
        update=partial(moejax.update_l1_coefficient, k=K, factor=factor),
    )


def biased(bias: jax.Array) -> Callable[..., Any]:
    """Sigmoid scores and two experts per image; the bias affects only which two."""
    return partial(moejax.sigmoid_top_k, bias=bias, k=K)


def expert_choice(memory: Any) -> Callable[..., Any]:
    """Every expert takes its best quarter of the images."""

    def rule(logits: jax.Array) -> moejax.ExpertChoice:
        return moejax.expert_choice(logits, capacity=max(1, K * len(logits) // EXPERTS))

    return rule


def taken(decision: moejax.ExpertChoice) -> jax.Array:
    """Which image was taken by which expert."""
    num_images, num_experts = decision.scores.shape
    experts = jnp.arange(num_experts)[:, None]
    return jnp.zeros((num_images, num_experts), bool).at[decision.tokens, experts].set(True)


METHODS = {
    "nothing": Method(top_2),
    "z-loss": with_loss(1e-3, moejax.router_z_loss),
    "load balancing, 0.01": with_loss(0.01, moejax.load_balancing_loss),
    "load balancing, 0.1": with_loss(0.1, moejax.load_balancing_loss),
    "balance bias": Method(
        biased,
        memory=jnp.zeros(EXPERTS),
        update=partial(moejax.update_balance_bias, rate=RATE),
    ),
    "expert choice": Method(expert_choice, chosen=taken, schedule=moejax.gather_slots),
    "ReLU, by 1.2": controlled(1e-8, 1.2),  # as published, for training thirty times as long
    "ReLU, by 1.02": controlled(1e-5, 1.02),
}
