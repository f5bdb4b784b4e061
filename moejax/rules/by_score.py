"""The rule that published models share: a score, a bias that only chooses, groups, a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax._calling import hashable
from moejax._checks import check_count, check_k, checked_logits, is_integer
from moejax._compiling import compiled
from moejax.base import Array, Routing

Score = Callable[[Array], Array]  # logits [T, E] -> non-negative scores [T, E]


class Groups(NamedTuple):
    """Equal groups of neighbouring experts, of which a token keeps the best.

    Attributes:
        num: how many groups there are.
        kept: how many a token may choose from.
        best: groups are ranked by the sum of their ``best`` best experts.
    """

    num: int = 1
    kept: int = 1
    best: int = 2


def by_score(
    logits: Array,
    bias: Array | None = None,
    *,
    k: int,
    score: Score = jax.nn.softmax,
    num_groups: int = 1,
    kept_groups: int = 1,
    group_best: int = 2,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    r"""Sends every token to the k experts with the largest ``score(logits) + bias``.

    .. math::
        s_t = \text{score}(l_t), \qquad e \in \text{top k of } s_t + b, \qquad
        g_{te} = \text{scale} \cdot \frac{s_{te}}{\sum_{j \in \text{top k}} s_{tj}}

    Experts are chosen by s + b, and weighted by s without b. With groups, experts compete only
    within the ``kept_groups`` groups whose ``group_best`` best ``s + b`` have the largest sum.

    `top_k` is this rule with a softmax and `sigmoid_top_k` with a sigmoid; both work on logarithms,
    so that they also rank and normalise scores that underflow. Here such scores tie. If all weights
    of a token underflow, they are zero; if the largest nearly does, they have no gradient.

    Args:
        logits: router output, shape [T, E].
        bias: b, shape [E], state without a gradient, which `update_balance_bias` updates after
            each step; None for zero.
        k: experts per token.
        score: ``logits -> s``, non-negative, shape [T, E]: ``jax.nn.softmax``, ``jax.nn.sigmoid``,
            `root_softplus` or your own.
        num_groups: number of equal groups of neighbouring experts, a divisor of E.
        kept_groups: how many groups a token may choose from.
        group_best: how many of its best experts a group is judged by; 1 for its maximum.
        renormalize: whether the k weights of a token sum to ``scale``.
        scale: multiplies the weights.

    Returns:
        A decision with K = k, the best ``s + b`` first; scores are s divided by its sum over E.
        Where -inf leaves a token fewer than k experts, its other choices go nowhere.

    Raises:
        ValueError: if shapes or numbers do not agree, or if a single weight is renormalised: it
            is then a constant and the router gets no gradient.

    Example:
        >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
        >>> by_score(logits, k=2, score=root_softplus).experts
        Array([[0, 1]], dtype=int32)
        >>> by_score(logits, jnp.array([0.0, 0.0, 0.0, 9.0]), k=2).experts
        Array([[3, 0]], dtype=int32)

    References:
        DeepSeek-AI, `DeepSeek-V2 <https://arxiv.org/abs/2405.04434>`_, 2024 (a softmax, groups by
        their maximum); `DeepSeek-V3 <https://arxiv.org/abs/2412.19437>`_, 2024 (a sigmoid, a bias,
        groups by their two best)
    """
    logits = checked_logits(logits)
    groups = Groups(num_groups, kept_groups, group_best)
    check_choice("by_score", logits, bias, k, groups, renormalize)
    return _by_score(logits, bias, scale, hashable(score), k, groups, renormalize)


@compiled("score", "k", "groups", "renormalize")
def _by_score(
    logits: Array,
    bias: Array | None,
    scale: Array | float,
    score: Score,
    k: int,
    groups: Groups,
    renormalize: bool,
) -> Routing:
    scores = score(logits)
    experts = choose(logits, scores, bias, k, groups)
    weights = of_choices(scores, experts, 0)
    if renormalize:
        weights = to_sum_one(weights)
    return Routing(experts, scale * weights, to_sum_one(scores), logits)


def root_softplus(logits: Array) -> Array:
    r"""A score for `by_score`, the root of softplus, with a finite gradient where it is zero.

    .. math:: s = \sqrt{\log(1 + e^x)}

    A score that underflows, as for an expert that -inf switches off, has a gradient of zero; a
    plain root would have none there.

    Args:
        logits: x, any shape.

    Returns:
        s, the shape of logits.

    Example:
        >>> root_softplus(jnp.array([1.0, -jnp.inf])).round(2)
        Array([1.15, 0.  ], dtype=float32)

    References:
        DeepSeek-AI, DeepSeek-V4, 2026
    """
    squared = jax.nn.softplus(logits)
    positive = squared >= jnp.finfo(squared.dtype).tiny  # smaller ones may count as zero
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def choose(logits: Array, scores: Array, bias: Array | None, k: int, groups: Groups) -> Array:
    """The `k_best` experts by score plus bias within the best groups, shape [T, K]."""
    ranked_by = scores if bias is None else scores + bias.astype(scores.dtype)[None]
    # An expert switched off by -inf stays off, although its bias grows while it gets no token.
    ranked_by = jnp.where(logits == -jnp.inf, -jnp.inf, ranked_by)
    if groups.kept < groups.num:
        ranked_by = _only_best_groups(ranked_by, groups)
    return k_best(ranked_by, k)


def k_best(ranked_by: Array, k: int) -> Array:
    """The k experts that rank highest, [T, K]; one that ranks at -inf becomes E, nowhere.

    But a token's first choice stays, so that a token with no expert left shows up as not a number.
    """
    ranks, experts = jax.lax.top_k(ranked_by, k)
    switched_off = (ranks == -jnp.inf) & (jnp.arange(k) > 0)[None]
    return jnp.where(switched_off, ranked_by.shape[-1], experts)


def of_choices(values: Array, experts: Array, nowhere: float) -> Array:
    """The values [T, E] of chosen experts, [T, K]; ``nowhere`` for choices that go nowhere."""
    num_experts = values.shape[-1]
    chosen = jnp.take_along_axis(values, jnp.minimum(experts, num_experts - 1), axis=-1)
    return jnp.where(experts < num_experts, chosen, nowhere)


def to_sum_one(weights: Array) -> Array:
    """Non-negative weights [T, K] divided by their sum over K; zeros where they all underflow."""
    limits = jnp.finfo(weights.dtype)
    largest = jax.lax.stop_gradient(weights).max(axis=-1, keepdims=True)  # [T, 1]
    # Not ">=": a weight that is not a number must show up in the output.
    divisible = ~(largest < limits.tiny)
    # The gradient is divided by the largest weight, too, and would overflow where that is nearly
    # the smallest number.
    steep = largest < limits.tiny / limits.eps
    weights = jnp.where(steep, jax.lax.stop_gradient(weights), weights)
    # Divide by the largest first: the derivative divides by the square of the sum, which is then
    # between 1 and K.
    weights = weights / jnp.where(divisible, largest, jnp.inf)
    return weights / jnp.where(divisible, weights.sum(axis=-1, keepdims=True), 1)


def check_choice(
    name: str, logits: Array, bias: Array | None, k: int, groups: Groups, renormalize: bool
) -> None:
    """Refuses arguments by which no choice can be made."""
    check_k(k, logits)
    num_experts = logits.shape[-1]
    if bias is not None:
        check_bias(bias, num_experts)
    if not is_integer(groups.num) or groups.num < 1 or num_experts % groups.num:
        raise ValueError(
            f"`num_groups` must divide the number of experts ({num_experts}), got {groups.num}."
        )
    served = groups.kept * (num_experts // groups.num)
    if not (is_integer(groups.kept) and 1 <= groups.kept <= groups.num and served >= k):
        raise ValueError(
            f"`kept_groups` must be between 1 and `num_groups` ({groups.num}) and leave at least "
            f"k = {k} experts to choose from, got {groups.kept}."
        )
    check_count("group_best", groups.best)
    if k == 1 and renormalize:
        raise ValueError(
            f"`{name}(k=1, renormalize=True)` gives every token a constant weight, so the "
            "router gets exactly zero gradient: pass renormalize=False."
        )


def check_bias(bias: Array, num_experts: int) -> None:
    """Refuses a bias that would broadcast."""
    if bias.shape != (num_experts,):
        raise ValueError(
            f"`bias` must hold one number per expert, [{num_experts}], got {list(bias.shape)}."
        )


def _only_best_groups(ranked_by: Array, groups: Groups) -> Array:
    num_tokens, num_experts = ranked_by.shape
    # [T, E] -> [T, groups, E / groups], its last axis in full: no -1 can be inferred where T is 0.
    grouped = ranked_by.reshape(num_tokens, groups.num, num_experts // groups.num)
    best = jax.lax.top_k(grouped, min(groups.best, grouped.shape[-1]))[0]  # [T, groups, best]
    # A group with fewer experts left counts only those; a group with none left is out.
    left = best > -jnp.inf
    best = jnp.where(left.any(axis=-1), jnp.where(left, best, 0).sum(axis=-1), -jnp.inf)
    kept_ids = jax.lax.top_k(best, groups.kept)[1]
    every = jnp.arange(groups.num, dtype=kept_ids.dtype)[None, None]
    kept = (kept_ids[..., None] == every).any(axis=1)  # [T, groups]
    # Not zero: with a negative bias, zero would win over every expert that is allowed.
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(num_tokens, num_experts)
