"""Rules that draw random numbers when they are given a key, and none otherwise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moejax._arrays import normal_cdf
from moejax._checks import check_several, checked_logits, is_number, positive_like
from moejax._compiling import compiled
from moejax.base import Array, Routing
from moejax.rules.softmax import top_k


def noisy_top_k(
    logits: Array, noise_scale: Array | float, *, k: int, key: Array | None = None
) -> Routing:
    r"""Sends every token to k experts, chosen after Gaussian noise is added to the logits.

    .. math::
        h_{te} = l_{te} + s_{te}\, \epsilon_{te}, \quad \epsilon_{te} \sim N(0, 1), \qquad
        g_t = \operatorname{softmax}(\text{the k largest } h_t)

    Without a key there is no noise: evaluation is deterministic by construction.

    Args:
        logits: clean router output, shape [T, E].
        noise_scale: standard deviation of the noise, positive, shape [T, E] or broadcastable to
            it; in the paper ``softplus(x W_noise) + 1e-2`` (see `noisy`), elsewhere a constant
            such as 1/E.
        k: experts per token, between 2 and E.
        key: a PRNG key, or None for no noise.

    Returns:
        A decision with K = k; scores are the softmax of the noisy logits, logits are the clean
        ones; chances are each expert's probability of being among the k, which `load_loss` reads.

    Raises:
        ValueError: as for `top_k`; k = 1 is refused because its one weight is the constant 1. Also
            if the scale does not broadcast to [T, E], or is a number that is not positive.

    Example:
        >>> route = partial(noisy_top_k, noise_scale=0.25, k=2)
        >>> logits = jnp.array([[3.0, 1.0, 2.0]])
        >>> route(logits).experts
        Array([[0, 2]], dtype=int32)
        >>> route(logits, key=jax.random.key(0)).weights.shape
        (1, 2)

    References:
        Shazeer et al., `Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer <https://arxiv.org/abs/1701.06538>`_, 2017
    """
    clean = checked_logits(logits)
    if k == 1:
        raise ValueError(
            "`noisy_top_k(k=1)` gives every token the constant weight 1, so the router gets "
            "exactly zero gradient: pass k=2, or use `switch`."
        )
    noise_scale = positive_like("noise_scale", noise_scale, "logits", clean)
    return _noisy_top_k(clean, noise_scale, key, k)


@compiled("k")
def _noisy_top_k(clean: Array, noise_scale: Array, key: Array | None, k: int) -> Routing:
    if key is None:
        return choose_noisy(clean, clean, noise_scale, k=k)
    noise = jax.random.normal(key, clean.shape, clean.dtype)
    return choose_noisy(clean, clean + noise * noise_scale, noise_scale, k=k)


def choose_noisy(clean: Array, noisy: Array, noise_scale: Array, *, k: int) -> Routing:
    """The k best by noisy logits, with the chance that fresh noise would choose each expert.

    Expert e is chosen again if its new noisy logit beats the k-th best of the others, which is
    the (k+1)-th of all if e is in the top k and the k-th otherwise.
    """
    decision = top_k(noisy, k=k)._replace(logits=clean)
    if k == clean.shape[-1]:
        return decision._replace(chances=jnp.ones_like(clean))
    best = jax.lax.top_k(noisy, k + 1)[0]  # [T, k + 1]
    last_in, first_out = best[:, k - 1 : k], best[:, k:]  # [T, 1] each
    # By id: a program that computes `noisy` twice may round it in two ways, and `first_out` would
    # be above itself.
    threshold = jnp.where(decision.chooses, first_out, last_in)
    return decision._replace(chances=_chance_above(threshold, clean, noise_scale))


def _chance_above(threshold: Array, mean: Array, scale: Array) -> Array:
    """``P(mean + scale N(0, 1) > threshold)``, with finite gradients where it is 0 or 1.

    It is 0 or 1 where an expert is switched off by a logit of -inf, where fewer than k others are
    left to beat, and where there is no noise to speak of.
    """
    smallest = math.sqrt(jnp.finfo(scale.dtype).tiny)  # its reciprocal can be squared
    settled = jnp.isinf(mean) | jnp.isinf(threshold) | (scale < smallest)
    # Around the division, not after it: zero times an infinite derivative would be NaN.
    distance = jnp.where(settled, 0, mean - threshold)
    chance = normal_cdf(distance / jnp.where(scale < smallest, 1, scale))
    return jnp.where(settled, (mean > threshold).astype(chance.dtype), chance)


def gshard_top_2(
    logits: Array, *, threshold: Array | float = 0.2, key: Array | None = None
) -> Routing:
    """Sends every token to its best expert and, at random, to its second best.

    The two weights are ``p_1`` and ``p_2`` divided by their sum. The second choice is kept with
    probability ``min(1, g_2 / threshold)``, and the first keeps its weight either way. Without a
    key every second choice is kept.

    Args:
        logits: router output, shape [T, E], E at least 2.
        threshold: second weights above it are always kept, positive.
        key: a PRNG key, or None to keep every second choice.

    Returns:
        A decision with K = 2 in which a second choice that was left out goes nowhere.

    Raises:
        ValueError: if logits is not a float array [T, E] with at least two experts, or if the
            threshold is a number that is not positive.

    Example:
        >>> gshard_top_2(jnp.array([[3.0, 1.0, 2.0]])).experts
        Array([[0, 2]], dtype=int32)
        >>> gshard_top_2(jnp.array([[9.0, 0.0, 0.0]]), key=jax.random.key(0)).experts
        Array([[0, 3]], dtype=int32)

    References:
        Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020
    """
    if is_number(threshold) and not threshold > 0:
        raise ValueError(
            f"`threshold` must be positive, got {threshold}: use `top_k(k=2)` to keep every "
            "second choice."
        )
    logits = checked_logits(logits)
    check_several("gshard_top_2", logits)
    return _gshard_top_2(logits, threshold, key)


@compiled()
def _gshard_top_2(logits: Array, threshold: Array | float, key: Array | None) -> Routing:
    decision = top_k(logits, k=2)
    if key is None:
        return decision
    second = decision.weights[:, 1]
    chance = second / jnp.asarray(threshold, second.dtype)
    kept = jax.random.uniform(key, second.shape, second.dtype) < chance
    kept = jnp.stack([jnp.ones_like(kept), kept], axis=-1)  # [T, 2]
    experts = jnp.where(kept, decision.experts, decision.num_experts)
    weights = jnp.where(kept, decision.weights, 0)
    # Not `_replace`: where E is 2 it would be a `DenseRouting` with some choices left out.
    return Routing(experts, weights, *decision[2:])
