"""A schedule whose gates multiply what the experts read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax._checks import check_problem, takes
from moejax._comparing import comparable
from moejax.base import Array, Expert, Params, Routing, Schedule


@comparable
def scale_inputs(schedule: Schedule) -> Schedule:
    r"""A schedule that applies each gate to the expert's input instead of its output.

    .. math:: y_t = \sum_k E_{e_{tk}}(w_{tk}\, x_t)

    Every choice becomes a token of its own, with one expert and weight 1, and ``schedule`` runs
    them; the K outputs of a token are added up. A choice that goes nowhere runs no expert, so it
    adds nothing, rather than an expert's output at zero.

    Args:
        schedule: `dense`, `dropless`, a `capacity`, an `expert_parallel`, or one of your own.

    Returns:
        A schedule for `moe`'s ``execute``.

    Raises:
        ValueError: in the schedule, if the params or tokens do not fit the decision, or if x
            holds integers.

    Example:
        >>> experts = moejax.stack(moejax.linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> routing = moejax.switch(jnp.ones((5, 4)))
        >>> execute = scale_inputs(moejax.dropless)
        >>> execute(moejax.linear(3, 2).apply, params, jnp.ones((5, 3)), routing).shape
        (5, 2)

    References:
        Meta, `The Llama 4 herd <https://ai.meta.com/blog/llama-4-multimodal-intelligence/>`_, 2025
    """

    @functools.wraps(schedule)
    def execute(expert: Expert, params: Params, x: Array, decision: Routing) -> Array:
        params, x = check_problem(params, x, decision.scores.shape)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(f"`scale_inputs` takes floats, which it scales, got {x.dtype}.")
        outputs = schedule(expert, params, _scaled(x, decision.weights), _one_each(decision))
        k = decision.experts.shape[1]
        by_choice = outputs.reshape(k, x.shape[0], *outputs.shape[1:])  # [K T, ...] -> [K, T, ...]
        return by_choice.sum(axis=0)

    return takes(Routing)(execute)


def _scaled(x: Array, weights: Array) -> Array:
    """Each choice's input ``w_tk x_t``, all first choices before any second one, [K T, ...]."""
    dtype = np.promote_types(x.dtype, weights.dtype)
    by_choice = weights.T.reshape(*weights.T.shape, *[1] * (x.ndim - 1))  # [K, T, 1 ...]
    scaled = by_choice.astype(dtype) * x.astype(dtype)[None]  # [K, T, ...]
    return scaled.astype(x.dtype).reshape(-1, *x.shape[1:])


def _one_each(decision: Routing) -> Routing:
    """The same choices, each as a token with a single choice of weight 1."""
    k = decision.experts.shape[1]
    chosen = decision.chosen.T.reshape(-1, 1)  # [K T, 1]
    rows = jax.tree.map(
        lambda a: jnp.tile(a, (k, 1)), (decision.scores, decision.logits)
    )  # only their shape is read
    experts = decision.experts.T.reshape(-1, 1)
    return Routing(experts, chosen.astype(decision.weights.dtype), *rows)
