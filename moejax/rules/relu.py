"""ReLU routing: gates that are continuous everywhere, and the controller of their sparsity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._checks import checked_logits, is_number, takes
from moejax._compiling import compiled
from moejax.base import Array, Routing


@compiled()
def relu(logits: Array) -> Routing:
    r"""Sends every token to the experts with a positive logit.

    .. math:: g_{te} = \max(l_{te}, 0)

    Their number differs between tokens. A penalty holds it at k on average: `l1_loss` times a
    coefficient, which `update_l1_coefficient` updates after each step. The gate is continuous in
    the logits, whereas the output of top-k jumps.

    Args:
        logits: router output, shape [T, E].

    Returns:
        A decision with K = E in which an expert with weight zero goes nowhere; but a token with
        no positive logit keeps its best expert, at weight zero, which sets it apart from padding.
        Scores are the gates, not normalised.

    Raises:
        ValueError: if logits is not a float array [T, E].

    Example:
        >>> routing = relu(jnp.array([[0.5, -1.0, 2.0]]))
        >>> routing.experts, routing.weights
        (Array([[0, 3, 2]], dtype=int32), Array([[0.5, 0. , 2. ]], dtype=float32))

    References:
        Wang et al., `ReMoE <https://arxiv.org/abs/2412.14711>`_, 2024
    """
    logits = checked_logits(logits)
    num_experts = logits.shape[-1]
    every = jnp.arange(num_experts, dtype=jnp.int32)[None]  # [1, E]
    best = every == jnp.argmax(logits, axis=-1, keepdims=True).astype(every.dtype)
    # Not "> 0": a logit that is not a number must show up in the output.
    inactive = (logits <= 0) & ~best
    gates = jax.nn.relu(logits)
    return Routing(jnp.where(inactive, num_experts, every), gates, gates, logits)


@takes(Routing)
def update_l1_coefficient(
    coefficient: Array | float, routing: Routing, *, k: int, factor: float = 1.2
) -> Array:
    r"""Steers `relu` towards k active experts per token.

    .. math:: c \leftarrow c \cdot \text{factor}^{\operatorname{sign}(\text{active} - k)}

    Args:
        coefficient: c, a scalar; the paper starts at 1e-8. A number counts as float32, and so does
            an array of integers.
        routing: the decision of this step.
        k: the average number of active experts per token to hold: a sparsity of ``1 - k / E``.
        factor: by how much c changes in a step.

    Returns:
        The coefficient of the next step, larger if more than k are active and unchanged at k.

    Example:
        >>> routing = relu(jnp.array([[0.5, 1.0, 2.0]]))
        >>> float(update_l1_coefficient(jnp.float32(1.0), routing, k=1, factor=2.0))
        2.0

    References:
        Wang et al., `ReMoE <https://arxiv.org/abs/2412.14711>`_, 2024
    """
    c = jnp.asarray(coefficient, jnp.float32 if is_number(coefficient) else None)
    if not jnp.issubdtype(c.dtype, jnp.floating):
        c = c.astype(jnp.float32)
    active = jnp.sum(routing.chosen & (routing.weights > 0))
    direction = jnp.sign(active - k * routing.present.sum())
    return c * jnp.asarray(factor, c.dtype) ** direction.astype(c.dtype)
