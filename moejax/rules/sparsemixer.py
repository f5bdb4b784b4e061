"""SparseMixer: one expert after another, drawn among those close to the best."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._checks import check_several, checked_logits, is_number
from moejax._compiling import compiled
from moejax.base import Array, Routing


def sparsemixer(logits: Array, *, epsilon: Array | float, key: Array | None = None) -> Routing:
    r"""Sends every token to two experts, each weighted among the experts close to it.

    The first expert is the best one, and its weight is the softmax of z over the experts with

    .. math:: \frac{\max z - z_e}{\max(|z_e|, \max z)} \le 2 \epsilon

    The second is chosen in the same way without the first. The two weights do not sum to one.

    With a key, for training, each expert is drawn from its softmax, and a draw other than the best
    expert gets a third of its weight with probability 3/4. The gradient is taken of the whole
    weight; together, the two give Heun's third-order estimate of the gradient through the draw.

    Args:
        logits: router output z, shape [T, E], E at least 2.
        epsilon: half the relative distance from the best at which an expert is left out, positive;
            0.01 in Phi-3.5-MoE.
        key: a PRNG key, or None to take the best.

    Returns:
        A decision with K = 2; scores are the softmax over all experts. A token with one expert
        left, the others at -inf, has a second choice that goes nowhere.

    Raises:
        ValueError: if logits is not a float array [T, E] with at least two experts, or if epsilon
            is a number that is not positive.

    Example:
        >>> routing = sparsemixer(jnp.array([[1.0, 3.0, 2.99]]), epsilon=0.01)
        >>> routing.experts, [f"{w:.3f}" for w in routing.weights[0]]
        (Array([[1, 2]], dtype=int32), ['0.502', '1.000'])

    References:
        Liu et al., `GRIN: GRadient-INformed MoE <https://arxiv.org/abs/2409.12136>`_, 2024;
        Abdin et al., `Phi-3 Technical Report <https://arxiv.org/abs/2404.14219>`_, 2024
    """
    logits = checked_logits(logits)
    check_several("sparsemixer", logits)
    if is_number(epsilon) and not epsilon > 0:
        raise ValueError(f"`epsilon` must be positive, got {epsilon}: it is 0.01 in Phi-3.5-MoE.")
    return _sparsemixer(logits, epsilon, key)


@compiled()
def _sparsemixer(logits: Array, epsilon: Array | float, key: Array | None) -> Routing:
    first_key, second_key = (None, None) if key is None else jax.random.split(key)
    nobody = jnp.zeros(logits.shape, bool)
    first, first_weight = _one_expert(logits, nobody, epsilon, first_key)
    taken = first[:, None] == jnp.arange(logits.shape[-1], dtype=first.dtype)[None]
    second, second_weight = _one_expert(logits, taken, epsilon, second_key)
    experts = jnp.stack([first, second], axis=-1)  # [T, 2]
    weights = jnp.stack([first_weight, second_weight], axis=-1)
    return Routing(experts, weights, jax.nn.softmax(logits), logits)


def _one_expert(
    logits: Array, taken: Array, epsilon: Array | float, key: Array | None
) -> tuple[Array, Array]:
    """The best expert of those that are not taken, or one drawn near it: ids and weights, [T]."""
    free = jnp.where(taken, -jnp.inf, logits)
    best = free.max(axis=-1, keepdims=True)
    allowed = 2 * jnp.asarray(epsilon).astype(logits.dtype)
    far = best - logits > allowed * jnp.maximum(jnp.abs(logits), best)
    # A first choice always stays, so that logits without a number show up as such.
    anyone = (best != -jnp.inf) | ~taken.any(axis=-1, keepdims=True)  # [T, 1]
    # Where no expert is left, the softmax would be NaN, and so would its gradient.
    near = jnp.where(anyone, jnp.where(far, -jnp.inf, free), 0)
    chances = jax.nn.softmax(near)
    favourite = jnp.argmax(near, axis=-1).astype(jnp.int32)
    if key is None:
        expert, factor = favourite, jnp.ones_like(chances[:, 0])
    else:
        expert, factor = _drawn(near, favourite, key)
    weight = jnp.take_along_axis(chances, expert[:, None], axis=-1)[:, 0]
    # The factor is in the value but not in the gradient.
    weight = weight + jax.lax.stop_gradient((factor - 1) * weight)
    there = anyone[:, 0]
    return jnp.where(there, expert, logits.shape[-1]), jnp.where(there, weight, 0)


def _drawn(near: Array, favourite: Array, key: Array) -> tuple[Array, Array]:
    """An expert per token, drawn from the softmax, and the factor of its weight."""
    draw_key, keep_key = jax.random.split(key)
    expert = jax.random.categorical(draw_key, near).astype(jnp.int32)
    kept = jax.random.uniform(keep_key, expert.shape, near.dtype) > 0.75
    whole = (expert == favourite) | kept
    return expert, jnp.where(whole, 1, 1 / 3).astype(near.dtype)
