"""Top-p: as many experts as a token needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._checks import check_k, checked_logits, is_number
from moejax._compiling import compiled
from moejax.base import Array, Routing
from moejax.rules.by_score import k_best, of_choices


def top_p(logits: Array, *, p: Array | float, k: int | None = None) -> Routing:
    r"""Sends every token to its best experts until their probabilities reach p.

    .. math:: q_t = \operatorname{softmax}(l_t), \qquad
        e \text{ is chosen if } \sum_{j \text{ before } e} q_{tj} < p

    Experts are in descending order of q. The weights are q, not renormalised. A sure token takes
    one expert, a doubtful one many.

    Args:
        logits: router output, shape [T, E].
        p: the probability to reach, in (0, 1]; a scalar, or one for each token, [T, 1].
        k: at most this many experts per token; None for E.

    Returns:
        A decision with K = k in which a token's later choices go nowhere; scores are q.

    Raises:
        ValueError: if logits is not a float array [T, E], if p is a number outside (0, 1] or of
            another shape, or if k is out of range.

    Example:
        >>> logits = jnp.log(jnp.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]))
        >>> top_p(logits, p=0.7).experts
        Array([[0, 3, 3],
               [0, 1, 3]], dtype=int32)

    References:
        Huang et al., `Harder Tasks Need More Experts <https://arxiv.org/abs/2403.07652>`_, 2024
    """
    logits = checked_logits(logits)
    k = logits.shape[-1] if k is None else k
    check_k(k, logits)
    if is_number(p) and not 0 < p <= 1:
        raise ValueError(f"`p` must be a probability above 0 and at most 1, got {p}.")
    per_token = (logits.shape[0], 1)
    if jnp.shape(p) not in ((), per_token):
        raise ValueError(
            f"`p` must be a scalar or one per token, {list(per_token)}, got {list(jnp.shape(p))}."
        )
    return _top_p(logits, p, k)


@compiled("k")
def _top_p(logits: Array, p: Array | float, k: int) -> Routing:
    num_experts = logits.shape[-1]
    scores = jax.nn.softmax(logits)
    # By logits and not by scores: scores that underflow to zero would tie.
    experts = k_best(logits, k)
    weights = of_choices(scores, experts, 0)  # [T, K], descending
    before = jnp.cumsum(weights, axis=-1) - weights
    enough = before >= jnp.asarray(p).astype(before.dtype)
    # The first choice stays, whatever the rounding of p.
    left_out = enough & (jnp.arange(k) > 0)[None]
    return Routing(
        jnp.where(left_out, num_experts, experts), jnp.where(left_out, 0, weights), scores, logits
    )
