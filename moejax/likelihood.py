"""The mixture likelihood: experts that compete to explain a target, instead of blending for it.

The error of the blend, ``(y - sum_e g_e mu_e)^2``, makes every expert correct the error that the
others leave. The likelihood of the mixture, ``-log sum_e g_e p_e(y)``, gives each expert its own
error, weighted by how well it explains the target compared with the others.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moejax._arrays import at_least_float32
from moejax._checks import check_mask, positive_like
from moejax.base import Array


def mixture_nll(log_gates: Array, log_likelihoods: Array, *, mask: Array | None = None) -> Array:
    r"""Minus the mean log-likelihood of a mixture.

    .. math:: -\frac{1}{T} \sum_t \log \sum_e g_{te}\, p_e(y_t \mid x_t)

    Args:
        log_gates: log g, normalised, shape [T, E]: ``jax.nn.log_softmax(logits)``.
        log_likelihoods: log p_e(y | x) of every expert, shape [T, E].
        mask: False for padding, booleans [T]. Such a row may hold anything here, but the values it
            was computed from must be finite, or the gradient through that computation is not.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: if the two do not have one shape [T, E], or the mask is not booleans [T].

    Example:
        >>> log_gates = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> f"{jnp.exp(-mixture_nll(log_gates, jnp.log(jnp.array([[0.8, 0.2]])))):.3f}"
        '0.500'

    References:
        Jacobs et al., `Adaptive Mixtures of Local Experts
        <https://doi.org/10.1162/neco.1991.3.1.79>`_, 1991
    """
    if log_gates.shape != log_likelihoods.shape or log_gates.ndim != 2:
        raise ValueError(
            "`log_gates` and `log_likelihoods` must both be of shape [tokens, experts], got "
            f"{list(log_gates.shape)} and {list(log_likelihoods.shape)}."
        )
    log_gates, log_likelihoods = at_least_float32(log_gates), at_least_float32(log_likelihoods)
    if mask is None:
        mask = jnp.ones(log_gates.shape[0], bool)
    check_mask(mask, log_gates.shape[:1])
    # Before the logarithm: zero times its gradient at a row that is not finite would be NaN.
    rows = [jnp.where(mask[:, None], row, 0) for row in (log_gates, log_likelihoods)]
    nll = jnp.where(mask, _nll(*rows), 0)
    return nll.sum() / jnp.maximum(mask.sum(), 1).astype(nll.dtype)


def gaussian_log_likelihood(
    means: Array, targets: Array, *, variance: Array | float = 1.0
) -> Array:
    r"""The log-likelihood of a Gaussian around the output of every expert.

    .. math:: \log N(y_t;\, \mu_{et},\, \text{variance} \cdot I)

    Args:
        means: the experts' outputs mu, shape [E, T, ...], as from `stack`.
        targets: y, shape [T, ...].
        variance: of every output, positive, a scalar or broadcastable to the means, so that
            [E, 1, ...] is one per expert.

    Returns:
        Log-likelihoods, shape [T, E].

    Raises:
        ValueError: if the shapes do not agree, or the variance is a number that is not positive.

    Example:
        >>> means = jnp.array([[[0.0]], [[1.0]]])  # two experts, one token
        >>> log_p = gaussian_log_likelihood(means, jnp.array([[1.0]]))
        >>> f"{log_p[0, 1] - log_p[0, 0]:.2f}"
        '0.50'
    """
    _check_targets(means, targets)
    means = at_least_float32(means)
    variance = positive_like("variance", variance, "means", means)
    error = means - targets.astype(means.dtype)[None]
    log_p = -0.5 * (error**2 / variance + jnp.log(variance) + math.log(2 * math.pi))
    return _sum_features(log_p)


def bernoulli_log_likelihood(logits: Array, labels: Array) -> Array:
    r"""The log-likelihood of zeros and ones under the logits of every expert.

    .. math:: y_t \log \sigma(l_{et}) + (1 - y_t) \log \sigma(-l_{et})

    Args:
        logits: the experts' outputs l, shape [E, T, ...], as from `stack`.
        labels: y, zeros and ones, shape [T, ...].

    Returns:
        Log-likelihoods, shape [T, E].

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> log_p = bernoulli_log_likelihood(jnp.zeros((2, 1, 1)), jnp.ones((1, 1)))
        >>> jnp.exp(log_p)
        Array([[0.5, 0.5]], dtype=float32)
    """
    _check_targets(logits, labels)
    logits = at_least_float32(logits)
    labels = labels.astype(logits.dtype)[None]
    log_p = labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits)
    return _sum_features(log_p)


def categorical_log_likelihood(logits: Array, labels: Array) -> Array:
    r"""The log-likelihood of a class under the logits of every expert.

    .. math:: \log \operatorname{softmax}(l_{et})_{y_t}

    Args:
        logits: the experts' outputs l, shape [E, T, ..., classes], as from `stack`.
        labels: y, integers [T, ...]; the labels of one token are independent. A label outside of
            [0, classes) gives NaN, which the ``mask`` of `mixture_nll` leaves out.

    Returns:
        Log-likelihoods, shape [T, E].

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> log_p = categorical_log_likelihood(jnp.zeros((2, 1, 4)), jnp.array([3]))
        >>> jnp.exp(log_p)
        Array([[0.25, 0.25]], dtype=float32)
    """
    _check_targets(logits, labels, "classes")
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    log_p = jnp.take_along_axis(log_p, labels[None, ..., None], axis=-1)[..., 0]  # [E, T, ...]
    # As an index, a negative label would count from the end; one too large is NaN already.
    return _sum_features(jnp.where(labels[None] < 0, jnp.nan, log_p))


def _nll(log_gates: Array, log_likelihoods: Array) -> Array:
    return -jax.nn.logsumexp(log_gates + log_likelihoods, axis=-1)  # [T]


def _sum_features(log_p: Array) -> Array:
    return log_p.sum(axis=range(2, log_p.ndim)).T  # [E, T, ...] -> [T, E]


def _check_targets(outputs: Array, targets: Array, *more: str) -> None:
    if outputs.ndim < 2 + len(more) or outputs.shape[1 : outputs.ndim - len(more)] != targets.shape:
        axes = ", ".join(["experts", *map(str, targets.shape), *more])
        raise ValueError(
            "Every expert must say something about every target: expected outputs of shape "
            f"[{axes}], got {list(outputs.shape)}."
        )
