"""Rules that read nothing but a token's own logits: softmax, top-k, Switch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._checks import check_k, checked_logits
from moejax._compiling import compiled
from moejax.base import Array, DenseRouting, Routing
from moejax.rules.by_score import k_best, of_choices


@compiled()
def softmax(logits: Array) -> Routing:
    r"""Sends every token to every expert, weighted by a softmax of its logits.

    .. math:: g_{te} = \frac{\exp l_{te}}{\sum_j \exp l_{tj}}

    Args:
        logits: router output, shape [T, E].

    Returns:
        A decision with K = E, experts in their order, and weights equal to the scores.

    Raises:
        ValueError: if logits is not a float array [T, E].

    Example:
        >>> softmax(jnp.zeros((1, 4))).weights
        Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)

    References:
        Jacobs et al., `Adaptive Mixtures of Local Experts
        <https://doi.org/10.1162/neco.1991.3.1.79>`_, 1991
    """
    logits = checked_logits(logits)
    scores = jax.nn.softmax(logits)
    experts = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
    return DenseRouting(experts, scores, scores, logits)


@compiled("k", "renormalize")
def top_k(logits: Array, *, k: int, renormalize: bool = True) -> Routing:
    r"""Sends every token to its k best experts: `by_score` with a softmax, ranked by logits.

    .. math::
        p_t = \operatorname{softmax}(l_t), \qquad
        g_{te} = \frac{p_{te}}{\sum_{j \in \text{top k}} p_{tj}}, \quad e \in \text{top k}

    The weights are the k largest p, divided by their sum (which equals the softmax over the k kept
    logits) or, with ``renormalize=False``, as they are.

    Args:
        logits: router output, shape [T, E].
        k: experts per token, between 1 and E.
        renormalize: whether the k weights of a token sum to one.

    Returns:
        A decision with K = k, the best expert first; scores are p. Where -inf leaves a token fewer
        than k < E experts, its other choices go nowhere.

    Raises:
        ValueError: if logits is not a float array [T, E], if k is out of range, or if a single
            weight is renormalised: it is then the constant 1 and the router gets no gradient.

    Example:
        >>> routing = top_k(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), k=2)
        >>> routing.experts, [f"{w:.3f}" for w in routing.weights[0]]
        (Array([[0, 2]], dtype=int32), ['0.625', '0.375'])

    References:
        Jiang et al., `Mixtral of Experts <https://arxiv.org/abs/2401.04088>`_, 2024
        (renormalised); Riquelme et al., `Scaling Vision with Sparse Mixture of Experts
        <https://arxiv.org/abs/2106.05974>`_, 2021 (raw)
    """
    logits = checked_logits(logits)
    check_k(k, logits)
    if k == 1 and renormalize:
        raise ValueError(
            "`top_k(k=1, renormalize=True)` gives every token the constant weight 1, so the "
            "router gets exactly zero gradient: pass renormalize=False, or use `switch`."
        )
    scores = jax.nn.softmax(logits)
    # By logits and not by scores: scores that underflow to zero would tie.
    if k == logits.shape[-1]:
        kept, experts = jax.lax.top_k(logits, k)
        return DenseRouting(experts, jax.nn.softmax(kept), scores, logits)
    experts = k_best(logits, k)
    if renormalize:
        weights = jax.nn.softmax(of_choices(logits, experts, -jnp.inf))
    else:
        weights = of_choices(scores, experts, 0)
    return Routing(experts, weights, scores, logits)


def switch(logits: Array) -> Routing:
    r"""Sends every token to one expert, weighted by its raw probability.

    .. math::
        p_t = \operatorname{softmax}(l_t), \qquad
        e_t = \arg\max_e p_{te}, \qquad
        g_t = p_{t e_t}

    Args:
        logits: router output, shape [T, E].

    Returns:
        A decision with K = 1.

    Raises:
        ValueError: if logits is not a float array [T, E].

    Example:
        >>> routing = switch(jnp.log(jnp.array([[0.25, 0.75]])))
        >>> routing.experts, f"{routing.weights[0, 0]:.2f}"
        (Array([[1]], dtype=int32), '0.75')

    References:
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    return top_k(logits, k=1, renormalize=False)
