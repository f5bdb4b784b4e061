"""Balance losses: unweighted scalars, read off one layer's decision.

One layer, one loss: pooled over layers, four of them each collapsed on another expert would look
balanced. The caller adds them to the task's loss with weights of its own. Masked tokens enter
neither sum nor count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax.types import Array, Routing


def load_balancing_loss(routing: Routing) -> Array:
    """How far the load is from uniform, ``E sum_e f_e P_e``.

    f_e is the share of the T K choices that go to expert e, before any capacity drops them, and
    has no gradient; P_e is the mean score of e. It is 1 at perfect balance for every K, and E / K
    at most. (Flaxformer and Hugging Face report K times this, Levanter 1/K of it.)

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar.

    Example:
        >>> balanced = moejax.top_k(3 * jnp.eye(4), k=2)
        >>> bool(load_balancing_loss(balanced) > 0.99)
        True

    References:
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    counts = choices_per_expert(routing)
    share = counts / jnp.maximum(counts.sum(), 1)  # f [E]
    mean_score = mean_over_tokens(routing, routing.scores)  # P [E]
    return routing.num_experts * jnp.sum(share.astype(mean_score.dtype) * mean_score)


def importance_loss(routing: Routing) -> Array:
    """How unequally the gates are spread, ``Var(I) / (Mean(I)^2 + 1e-10)``.

    ``I_e = sum_t g_te`` is the importance of expert e; the variance is the population's. Written
    so, and not as ``(std / mean)^2``, its gradient is finite at perfect balance.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar, zero at perfect balance.

    Example:
        >>> float(importance_loss(moejax.softmax(jnp.zeros((3, 4)))))
        0.0

    References:
        Shazeer et al., `Outrageously Large Neural Networks
        <https://arxiv.org/abs/1701.06538>`_, 2017
    """
    importance = jnp.zeros(routing.num_experts, routing.weights.dtype)
    importance = importance.at[routing.experts].add(routing.weights, mode="drop")  # [E]
    return jnp.var(importance) / (jnp.mean(importance) ** 2 + 1e-10)


def router_z_loss(routing: Routing) -> Array:
    """How large the logits are, ``mean_t logsumexp(logits_t)^2``.

    Args:
        routing: a decision of T tokens among E experts; its logits are clean of noise.

    Returns:
        A scalar.

    Example:
        >>> float(router_z_loss(moejax.softmax(jnp.zeros((3, 1)))))
        0.0

    References:
        Zoph et al., `ST-MoE <https://arxiv.org/abs/2202.08906>`_, 2022
    """
    return mean_over_tokens(routing, jax.nn.logsumexp(routing.logits, axis=-1) ** 2)


def choices_per_expert(routing: Routing) -> Array:
    """How many choices go to each expert, int32 [E]."""
    counts = jnp.zeros(routing.num_experts, jnp.int32)
    return counts.at[routing.experts].add(1, mode="drop")


def mean_over_tokens(routing: Routing, values: Array) -> Array:
    """The mean of values [T, ...] over the tokens that are not masked."""
    kept = routing.chosen.any(axis=-1)  # [T]
    kept = kept.reshape(-1, *[1] * (values.ndim - 1))  # [T, 1...]
    count = jnp.maximum(kept.sum(), 1).astype(values.dtype)
    return jnp.where(kept, values, 0).sum(axis=0) / count
