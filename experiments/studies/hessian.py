"""What the Hessian of a loss is like, from its products with vectors alone.

Except in `hessian_vector`, parameters are one row [P], as `jax.flatten_util.ravel_pytree` makes
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any], jax.Array]  # params -> scalar
Product = Callable[[jax.Array], jax.Array]  # v [P] -> H v [P]
LOST = 100  # in units of rounding: a vector of which less is left lies in the span of others


def hessian_vector(loss: Loss, params: Any, vector: Any) -> Any:
    r"""The product of the Hessian with a vector, by reverse mode over reverse mode.

    .. math:: H v = \nabla \langle \nabla L, v \rangle

    Args:
        loss: ``params -> scalar``.
        params: pytree of arrays at which the Hessian is taken.
        vector: v, a pytree like the parameters.

    Returns:
        H v, a pytree like the parameters.

    References:
        Pearlmutter, `Fast Exact Multiplication by the Hessian
        <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994
    """
    return jax.grad(lambda params: optax.tree.vdot(jax.grad(loss)(params), vector))(params)


class Tridiagonal(NamedTuple):
    """A symmetric matrix as its Krylov space sees it.

    Attributes:
        alpha: the diagonal, [k].
        beta: ``beta[j]`` stands beside ``alpha[j]`` and ``alpha[j + 1]``; the last one is what the
            space leaves out, [k].
        basis: orthonormal rows, [k, P].
    """

    alpha: jax.Array
    beta: jax.Array
    basis: jax.Array


def lanczos(product: Product, start: jax.Array, steps: int) -> Tridiagonal:
    r"""An orthonormal basis in which a symmetric matrix is tridiagonal.

    .. math:: H q_j = \beta_{j-1} q_{j-1} + \alpha_j q_j + \beta_j q_{j+1}

    Every vector is made orthogonal to all before it, twice: otherwise rounding lets eigenvalues
    that were already found come back.

    Args:
        product: ``v [P] -> H v [P]``.
        start: where the space begins, [P], not zero.
        steps: k, less than P. If the space has fewer dimensions, the rest is zero.

    Returns:
        The matrix in the basis, and the basis.

    References:
        Lanczos, `An Iteration Method for the Solution of the Eigenvalue Problem
        <https://doi.org/10.6028/jres.045.026>`_, 1950;
        Golub and Van Loan, Matrix Computations, 4th edition, section 10.3
    """

    def step(
        carry: tuple[jax.Array, jax.Array], place: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        basis, vector = carry
        basis = basis.at[place].set(vector)
        image = product(vector)
        rest = without(basis, without(basis, image))
        beta = jnp.linalg.norm(rest)
        more = beta > LOST * jnp.finfo(rest.dtype).eps * jnp.linalg.norm(image)
        beta = jnp.where(more, beta, 0)
        vector = jnp.where(more, rest / jnp.where(more, beta, 1), 0)
        return (basis, vector), (image @ basis[place], beta)

    empty = jnp.zeros((steps, *start.shape), start.dtype)
    first = start / jnp.linalg.norm(start)
    (basis, _), (alpha, beta) = jax.lax.scan(step, (empty, first), jnp.arange(steps))
    return Tridiagonal(alpha, beta, basis)


def without(basis: jax.Array, vector: jax.Array) -> jax.Array:
    """What is left of a vector without its part in the span of orthonormal rows."""
    return vector - (basis @ vector) @ basis


class Ritz(NamedTuple):
    """What a Krylov space says about the spectrum.

    Attributes:
        values: approximate eigenvalues, in rising order, [k].
        weights: the share of the start in each of their vectors, summing to 1, [k].
        vector: of the largest, of norm 1, [P].
        residual: ``|H v - value v|`` of the largest: an eigenvalue is at most that far from it.
    """

    values: jax.Array
    weights: jax.Array
    vector: jax.Array
    residual: jax.Array


def ritz(found: Tridiagonal) -> Ritz:
    """The eigenvalues of the tridiagonal matrix, and the vector of the largest.

    Args:
        found: from `lanczos`, k steps.

    Returns:
        Values, weights, vector and residual. If the space has fewer than k dimensions, the surplus
        values lie below all others, with weight zero.
    """
    there = found.basis.any(axis=1)
    below = -2 * (jnp.abs(found.alpha) + found.beta).sum() - 1  # of all eigenvalues (Gershgorin)
    beside = jnp.diag(found.beta[:-1], 1)
    diagonal = jnp.diag(jnp.where(there, found.alpha, below))
    values, vectors = jnp.linalg.eigh(diagonal + beside + beside.T)
    vector = vectors[:, -1] @ found.basis
    residual = found.beta[-1] * jnp.abs(vectors[-1, -1])
    return Ritz(values, vectors[0] ** 2, vector / jnp.linalg.norm(vector), residual)


def density(
    values: jax.Array, weights: jax.Array, places: jax.Array, width: jax.Array | float
) -> jax.Array:
    r"""The density of eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \phi(t) = \frac{1}{m} \sum_{i=1}^m \sum_j w_{ij}\, \mathcal{N}(t;\, \theta_{ij}, s^2)

    Args:
        values: theta, of `ritz` from m random starts, [m, k].
        weights: w, [m, k].
        places: t, [N].
        width: s, the standard deviation of the Gaussian that stands for an eigenvalue.

    Returns:
        The density at the places, of integral 1, [N].

    References:
        Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue
        Density <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    bells = jax.scipy.stats.norm.pdf(places[:, None], values.reshape(1, -1), width)  # [N, m k]
    return bells @ weights.reshape(-1) / len(values)


def rademacher(key: jax.Array, params: jax.Array) -> jax.Array:
    """A random vector of signs, of the shape and dtype of the parameters."""
    return jax.random.rademacher(key, params.shape, params.dtype)


class Estimate(NamedTuple):
    """A mean over samples, and the standard error of the mean."""

    mean: jax.Array
    error: jax.Array


def hutchinson(product: Product, params: jax.Array, keys: jax.Array) -> Estimate:
    r"""The trace of a matrix, from random signs.

    .. math:: \operatorname{tr} H = \mathbb{E}\, z^\top H z, \qquad z_i = \pm 1

    Args:
        product: ``v [P] -> H v [P]``.
        params: of the shape and dtype of the vectors, [P].
        keys: one for each sample, at least two.

    Returns:
        The mean of the samples and its standard error.

    References:
        Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix
        <https://doi.org/10.1080/03610919008812866>`_, 1990
    """

    def sample(key: jax.Array) -> jax.Array:
        signs = rademacher(key, params)
        return signs @ product(signs)

    samples = jax.lax.map(sample, keys)
    return Estimate(samples.mean(), samples.std(ddof=1) / jnp.sqrt(len(samples)))


def along(loss: Loss, params: jax.Array, direction: jax.Array, distances: jax.Array) -> jax.Array:
    """The loss on a line through the parameters, ``L(params + t direction)``.

    Args:
        loss: ``params [P] -> scalar``.
        params: [P].
        direction: of norm 1, [P].
        distances: t, [N].

    Returns:
        Losses, [N].
    """
    return jax.lax.map(lambda distance: loss(params + distance * direction), distances)
