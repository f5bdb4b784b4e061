"""Jordan and Jacobs' tree: a gate chooses a group, the group's own gate an expert.

    p(y | x) = sum_g a_g(x) sum_e b_e|g(x) p_ge(y | x)

Groups times experts are E leaves, which `moejax.mixture_nll` sees as one mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moejax

LEAST_VARIANCE = 1e-4  # a leaf that fits one point exactly would have none


class Family(NamedTuple):
    """What leaves say about a target.

    Attributes:
        log_likelihood: ``(outputs [E, N, 1], y, log_variance [E]) -> log p_e(y) [N, E]``.
        fitted: ``(outputs, y, posterior [N, E], log_variance) -> log_variance`` of the M-step.
        mean: ``outputs -> the mean of y``, by leaf.
    """

    log_likelihood: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    fitted: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    mean: Callable[[jax.Array], jax.Array]


def gaussian_log_likelihood(outputs: jax.Array, y: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Gaussians with a variance per leaf."""
    variance = jnp.exp(log_variance)[:, None, None]
    return moejax.gaussian_log_likelihood(outputs, y, variance=variance)


def fitted_variance(
    outputs: jax.Array, y: jax.Array, posterior: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """``log sum_n h_ne (y_n - mu_ne)^2 / sum_n h_ne``, not below the least variance."""
    squares = jnp.einsum("ne,eno->e", posterior, (outputs - y[None]) ** 2)
    weight = posterior.sum(axis=0)
    variance = squares / jnp.where(weight > 0, weight, 1)
    return jnp.where(weight > 0, jnp.log(jnp.maximum(variance, LEAST_VARIANCE)), log_variance)


GAUSSIAN = Family(gaussian_log_likelihood, fitted_variance, lambda outputs: outputs)
BERNOULLI = Family(
    lambda outputs, y, log_variance: moejax.bernoulli_log_likelihood(outputs, y[:, None]),
    lambda outputs, y, posterior, log_variance: log_variance,
    jax.nn.sigmoid,
)


class Tree(NamedTuple):
    """The sizes of a tree with linear gates and linear leaves: D inputs, groups, leaves of each."""

    width: int
    groups: int
    leaves: int


def init(tree: Tree, key: jax.Array) -> Any:
    """Parameters in the widest float that is on: ``top``, ``low``, ``experts``, ``log_variance``.

    ``low`` has a leading axis of groups, ``experts`` one of all leaves.
    """
    keys = jax.random.split(key, 3)
    count = tree.groups * tree.leaves
    params = {
        "top": moejax.linear(tree.width, tree.groups).init(keys[0]),
        "low": moejax.stack(moejax.linear(tree.width, tree.leaves), tree.groups).init(keys[1]),
        "experts": moejax.stack(leaf(tree), count).init(keys[2]),
        "log_variance": jnp.zeros(count),
    }
    return jax.tree.map(lambda array: array.astype(jnp.zeros(()).dtype), params)


def leaf(tree: Tree) -> moejax.Layer:
    """One expert."""
    return moejax.linear(tree.width, 1)


def outputs(tree: Tree, params: Any, x: jax.Array) -> jax.Array:
    """What every leaf says, [E, N, 1]."""
    return moejax.stack(leaf(tree), tree.groups * tree.leaves).apply(params["experts"], x)


def log_gates(tree: Tree, params: Any, x: jax.Array) -> jax.Array:
    """``log a_g + log b_e|g``, [N, E]."""
    top = jax.nn.log_softmax(moejax.linear(tree.width, tree.groups).apply(params["top"], x))
    low_gates = moejax.stack(moejax.linear(tree.width, tree.leaves), tree.groups)
    low = jax.nn.log_softmax(low_gates.apply(params["low"], x))  # [groups, N, leaves]
    return (top.T[:, :, None] + low).transpose(1, 0, 2).reshape(len(x), -1)


def parts(
    tree: Tree, family: Family, params: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two arguments of `moejax.mixture_nll`, [N, E] each."""
    said = outputs(tree, params, x)
    return log_gates(tree, params, x), family.log_likelihood(said, y, params["log_variance"])


def nll(tree: Tree, family: Family, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Minus the mean log-likelihood."""
    return moejax.mixture_nll(*parts(tree, family, params, x, y))


def mean(tree: Tree, family: Family, params: Any, x: jax.Array) -> jax.Array:
    """The mean of y, ``sum_e g_e mu_e``, [N]."""
    gates = jnp.exp(log_gates(tree, params, x))
    return jnp.einsum("ne,eno->n", gates, family.mean(outputs(tree, params, x)))
