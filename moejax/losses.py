"""Balance losses: unweighted scalars, read off one layer's decision.

One layer, one loss: if decisions were pooled, four layers that each collapse onto a different
expert would look balanced. The caller adds the losses to the task's loss with its own weights.
Masked tokens enter neither sums nor counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._arrays import where_kept
from moejax._checks import takes
from moejax._compiling import compiled
from moejax.base import Array, ExpertChoice, Routing, SoftSlots


@takes(Routing)
@compiled()
def load_balancing_loss(routing: Routing) -> Array:
    r"""How far the load is from uniform.

    .. math:: E \sum_e f_e P_e

    :math:`f_e` is the share of all choices that go to expert e, before any capacity drops them, and
    has no gradient; :math:`P_e` is the mean score of e. The loss is 1 at perfect balance for every
    K, and E / K at most where every token makes K choices. (Flaxformer and Hugging Face report K
    times this, Levanter 1/K of it.) Where every token goes to all experts, as from `softmax`, it is
    1 whatever the router does.

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
    counts = routing.counts.astype(routing.scores.dtype)
    share = counts / jnp.maximum(counts.sum(), 1)  # f [E]
    mean_score = mean_over_tokens(routing, routing.scores)  # P [E]
    return routing.num_experts * jnp.sum(share * mean_score)


@takes(Routing)
@compiled()
def importance_loss(routing: Routing) -> Array:
    r"""How unequally the gates are spread: the squared coefficient of variation.

    .. math::
        I_e = \sum_t g_{te}, \qquad
        \frac{\operatorname{Var}(I)}{\operatorname{Mean}(I)^2 + 10^{-10}}

    :math:`I_e` is the importance of expert e; the variance is the population's. Written this way,
    rather than as ``(std / mean)^2``, it has a finite gradient at perfect balance.

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
    return _squared_variation(routing.gates.sum(axis=0))


@takes(Routing)
@compiled()
def load_loss(routing: Routing) -> Array:
    r"""How unequally the experts are chosen, as a smooth function.

    .. math::
        L_e = \sum_t P(e \in \text{top k of } t), \qquad
        \frac{\operatorname{Var}(L)}{\operatorname{Mean}(L)^2 + 10^{-10}}

    The probability is over fresh noise on expert e; unlike a count of choices, it has a gradient.

    Args:
        routing: a decision of T tokens among E experts, from `noisy_top_k`.

    Returns:
        A scalar, zero at perfect balance.

    Raises:
        ValueError: if the rule has no noise, so that there are no chances.

    Example:
        >>> route = partial(moejax.noisy_top_k, noise_scale=1.0, k=2)
        >>> float(load_loss(route(jnp.zeros((3, 4)))))
        0.0

    References:
        Shazeer et al., `Outrageously Large Neural Networks
        <https://arxiv.org/abs/1701.06538>`_, 2017, appendix A
    """
    if routing.chances is None:
        raise ValueError(
            "`load_loss` reads the chances of being chosen, which only a noisy rule knows: route "
            "with `noisy_top_k`, or use `load_balancing_loss`."
        )
    return _squared_variation(jnp.where(routing.present[:, None], routing.chances, 0).sum(axis=0))


@takes(Routing, ExpertChoice, SoftSlots)
@compiled()
def router_z_loss(routing: Routing | ExpertChoice | SoftSlots) -> Array:
    r"""How large the logits are.

    .. math:: \frac{1}{T} \sum_t \left( \log \sum_e \exp l_{te} \right)^2

    Args:
        routing: a decision of any kind of T tokens; its logits are without noise, and the sum is
            over all experts and their slots.

    Returns:
        A scalar.

    Example:
        >>> float(router_z_loss(moejax.softmax(jnp.zeros((3, 1)))))
        0.0

    References:
        Zoph et al., `ST-MoE <https://arxiv.org/abs/2202.08906>`_, 2022
    """
    every = tuple(range(1, routing.logits.ndim))  # [T, E], or [T, E, C] of slots
    # A token without an expert may have no logit but minus infinity, whose gradient is no number.
    logits = where_kept(routing.present, routing.logits)
    return mean_over_tokens(routing, jax.nn.logsumexp(logits, axis=every) ** 2)


@takes(Routing, ExpertChoice)
@compiled()
def entropy_loss(routing: Routing) -> Array:
    r"""How undecided the router is, in nats: small when it is sure of a token.

    .. math:: \frac{1}{T} \sum_t H(p_t), \qquad H(p) = -\sum_e p_e \log p_e

    Args:
        routing: a decision of T tokens among E experts whose scores p sum to one.

    Returns:
        A scalar between 0 and log E.

    Example:
        >>> f"{entropy_loss(moejax.softmax(jnp.zeros((3, 4)))):.4f}"  # log 4
        '1.3863'
    """
    return mean_over_tokens(routing, entropy(routing.scores))


@takes(Routing, ExpertChoice)
@compiled()
def mutual_information_loss(routing: Routing) -> Array:
    r"""Minus what the expert tells about the token, in nats.

    .. math:: \frac{1}{T} \sum_t H(p_t) - H\left( \frac{1}{T} \sum_t p_t \right)

    Minimised, it makes the router sure of each token and spreads the tokens over all experts: a
    balanced hard assignment has the best value, ``-log E``; collapse and indecision have 0.

    Args:
        routing: a decision of T tokens among E experts whose scores p sum to one.

    Returns:
        A scalar between ``-log E`` and 0.

    Example:
        >>> f"{mutual_information_loss(moejax.softmax(99 * jnp.eye(4))):.4f}"
        '-1.3863'

    References:
        Bridle et al., `Unsupervised Classifiers, Mutual Information and 'Phantom Targets'
        <https://proceedings.neurips.cc/paper/1991/hash/a8abb4bb284b5b27aa7cb790dc20f80b-Abstract.html>`_,
        1991
    """
    mean_score = mean_over_tokens(routing, routing.scores)
    return entropy_loss(routing) - entropy(mean_score)


@takes(Routing)
@compiled()
def l1_loss(routing: Routing) -> Array:
    r"""The size of the gates: what keeps `relu` routing sparse.

    .. math:: \frac{1}{T} \sum_t \sum_e |g_{te}|

    Its coefficient is the state of `update_l1_coefficient`. To balance the experts as well, use
    `load_balancing_loss` in its place: because the scores of `relu` are its gates, that loss
    weights every gate by the load of its expert.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar.

    Example:
        >>> float(l1_loss(moejax.relu(jnp.array([[0.5, -1.0, 2.0]]))))
        2.5

    References:
        Wang et al., `ReMoE <https://arxiv.org/abs/2412.14711>`_, 2024
    """
    return mean_over_tokens(routing, jnp.abs(routing.weights).sum(axis=-1))


def entropy(p: Array) -> Array:
    """``-sum p log p`` over the last axis, with a finite gradient where p is zero."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)


def mean_over_tokens(routing: Routing | ExpertChoice | SoftSlots, values: Array) -> Array:
    """The mean of values [T, ...] over the tokens that are not masked."""
    return mean_over_kept(routing.present, values)


def mean_over_kept(kept: Array, values: Array) -> Array:
    """The mean of values [T, ...] over the tokens that are kept, bool [T]; zero if none is."""
    count = jnp.maximum(kept.sum(), 1).astype(values.dtype)
    return where_kept(kept, values).sum(axis=0) / count


def _squared_variation(load: Array) -> Array:
    # Not (std / mean)^2: the gradient of the root is NaN at exact balance.
    return jnp.var(load) / (jnp.mean(load) ** 2 + 1e-10)
