"""Expectation and maximisation for a tree of experts, after Jordan and Jacobs.

The E-step asks how much of each target belongs to which leaf, ``h_ne ∝ g_ne p_e(y_n)``. The M-step
then fits every gate and every leaf separately to its share. Each fit is a weighted maximum
likelihood of one layer, for which Newton's method is iteratively reweighted least squares. A step
that would lower its likelihood is halved, so that the likelihood of the whole never falls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import moejax
from studies.tree import Family, Tree, nll, outputs, parts

NEWTON_STEPS = 2  # of each fit, in each M-step
LEAST_RATE = 2.0**-20
RIDGE = 1e-8  # a softmax ignores a shift of all logits, so its curvature has a zero eigenvalue


def fit(
    tree: Tree, family: Family, params: Any, x: jax.Array, y: jax.Array, iterations: int
) -> tuple[Any, jax.Array]:
    """Iterates EM.

    Args:
        tree: its sizes.
        family: of the leaves.
        params: where to begin, as from `tree.init`.
        x: inputs [N, D].
        y: targets.
        iterations: how many.

    Returns:
        The parameters, and the negative log-likelihood before the first iteration and after each,
        [iterations + 1].
    """

    def body(params: Any, _: None) -> tuple[Any, jax.Array]:
        improved = iterate(tree, family, params, x, y)
        return improved, nll(tree, family, improved, x, y)

    last, values = jax.lax.scan(body, params, length=iterations)
    return last, jnp.concatenate([nll(tree, family, params, x, y)[None], values])


def iterate(tree: Tree, family: Family, params: Any, x: jax.Array, y: jax.Array) -> Any:
    """One E-step and one M-step."""
    posterior = jax.nn.softmax(sum(parts(tree, family, params, x, y)), axis=-1)  # [N, E]
    by_group = posterior.reshape(len(x), tree.groups, tree.leaves)
    top, low = (moejax.linear(tree.width, count) for count in (tree.groups, tree.leaves))
    return {
        "top": newton(partial(gate_likelihood, top, x, by_group.sum(axis=2)), params["top"]),
        "low": jax.vmap(
            lambda one, share: newton(partial(gate_likelihood, low, x, share), one),
            in_axes=(0, 1),
        )(params["low"], by_group),
        **fitted_leaves(tree, family, params, x, y, posterior),
    }


def gate_likelihood(gate: moejax.Layer, x: jax.Array, share: jax.Array, params: Any) -> jax.Array:
    """``sum_n sum_e h_ne log g_e(x_n)``, where the shares h are [N, E]."""
    return jnp.sum(share * jax.nn.log_softmax(gate.apply(params, x)))


def fitted_leaves(
    tree: Tree, family: Family, params: Any, x: jax.Array, y: jax.Array, posterior: jax.Array
) -> dict[str, Any]:
    """Every leaf fitted to its share: first its output, then its variance."""

    def one(params: Any, log_variance: jax.Array, share: jax.Array) -> Any:
        def likelihood(params: Any) -> jax.Array:
            said = moejax.linear(tree.width, 1).apply(params, x)[None]
            return jnp.sum(share * family.log_likelihood(said, y, log_variance[None])[:, 0])

        return newton(likelihood, params)

    experts = jax.vmap(one, in_axes=(0, 0, 1))(params["experts"], params["log_variance"], posterior)
    said = outputs(tree, {"experts": experts}, x)
    return {
        "experts": experts,
        "log_variance": family.fitted(said, y, posterior, params["log_variance"]),
    }


def newton(objective: Callable[[Any], jax.Array], params: Any) -> Any:
    """Some steps of Newton's method towards a maximum, none of which lowers the objective.

    Args:
        objective: concave, ``params -> scalar``.
        params: where to begin.
    """
    begin, unravel = ravel_pytree(params)

    def value(flat: jax.Array) -> jax.Array:
        return objective(unravel(flat))

    def step(flat: jax.Array, _: None) -> tuple[jax.Array, None]:
        curvature = RIDGE * jnp.eye(len(flat), dtype=flat.dtype) - jax.hessian(value)(flat)
        direction = jnp.linalg.solve(curvature, jax.grad(value)(flat))
        before = value(flat)

        def too_far(rate: jax.Array) -> jax.Array:
            # Not "lower than", so that a value that is not a number counts as too far, too.
            return (rate > LEAST_RATE) & ~(value(flat + rate * direction) >= before)

        rate = jax.lax.while_loop(too_far, lambda rate: rate / 2, jnp.ones((), flat.dtype))
        rate = jnp.where(value(flat + rate * direction) >= before, rate, 0)
        return jnp.where(rate > 0, flat + rate * direction, flat), None

    return unravel(jax.lax.scan(step, begin, length=NEWTON_STEPS)[0])
