"""Schedules for the decisions in which the slots of experts choose tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moejax._arrays import along, blend_dtype, gradient_where, output_dtype
from moejax._checks import check_array, check_outputs, check_problem, takes
from moejax.base import Array, Expert, ExpertChoice, Params, SoftSlots


@takes(ExpertChoice)
def gather_slots(expert: Expert, params: Params, x: Array, decision: ExpertChoice) -> Array:
    r"""Runs every expert on the tokens it took, and adds up the outputs for each token.

    .. math:: y_t = \sum_{(e, c)\,:\,\text{tokens}_{ec} = t} w_{ec}\, E_e(x_t)

    Args:
        expert: any pure function ``f(params, x [C, ...]) -> [C, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, shape [T, ...].
        decision: from `expert_choice`.

    Returns:
        The sum, shape [T, ...], in the dtype of x; zeros for a token that no expert took.

    Example:
        >>> model = moejax.moe(
        ...     moejax.linear(3, 2), moejax.linear(3, 4), num_experts=4,
        ...     route=partial(moejax.expert_choice, capacity=2), execute=moejax.gather_slots,
        ... )
        >>> y, decision = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3)))
        >>> y.shape, decision.tokens.shape
        ((5, 2), (4, 2))
    """
    params, x = check_problem(params, x, decision.scores.shape)
    # An empty slot repeats its expert's first token: the expert may be undefined at zero.
    filled = decision.tokens < x.shape[0]  # [E, C]
    taken = x[jnp.where(filled, decision.tokens, decision.tokens[:, :1]) % max(x.shape[0], 1)]
    taken = jnp.where(along(filled, taken.ndim), taken, jax.lax.stop_gradient(taken))
    params = gradient_where(filled.any(axis=1), params)
    outputs = jax.vmap(_checked(expert))(params, taken)  # [E, C, O]
    outputs = jnp.where(along(filled, outputs.ndim), outputs, 0)
    dtype = blend_dtype(decision.weights, outputs)
    weighted = jax.vmap(jax.vmap(jnp.multiply))(
        decision.weights.astype(dtype), outputs.astype(dtype)
    )
    y = jnp.zeros((x.shape[0], *outputs.shape[2:]), dtype)
    y = y.at[decision.tokens].add(weighted, mode="drop")  # T, an empty slot, is out of bounds
    return y.astype(output_dtype(x, outputs))


@takes(SoftSlots)
def mix_slots(expert: Expert, params: Params, x: Array, decision: SoftSlots) -> Array:
    r"""Runs every expert on its slots (means of tokens); each token gets a mean of the outputs.

    .. math::
        s_{ec} = \sum_t \text{dispatch}_{tec}\, x_t, \qquad
        y_t = \sum_{ec} \text{combine}_{tec}\, E_e(s_{ec})

    Args:
        expert: any pure function ``f(params, x [C, ...]) -> [C, ...]``.
        params: its parameters, every leaf with a leading axis E.
        x: tokens, float, shape [T, ...].
        decision: from `soft_slots`.

    Returns:
        The outputs, shape [T, ...], in the dtype of x.

    Raises:
        ValueError: if x holds integers.

    Example:
        >>> model = moejax.moe(
        ...     moejax.linear(3, 2), moejax.slots(3, 4, 2), num_experts=4,
        ...     route=moejax.soft_slots, execute=moejax.mix_slots,
        ... )
        >>> y, decision = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3)))
        >>> y.shape, decision.dispatch.shape
        ((5, 2), (5, 4, 2))
    """
    params, x = check_problem(params, x, decision.dispatch.shape[:2])
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"`mix_slots` takes floats, of which it makes means, got {x.dtype}.")
    dtype = np.promote_types(decision.dispatch.dtype, x.dtype)
    dispatch, combine = decision.dispatch.astype(dtype), decision.combine.astype(dtype)
    # Zero times not-a-number is not zero: a token in no slot must not be read.
    used = dispatch.any(axis=(1, 2)).reshape(-1, *[1] * (x.ndim - 1))
    tokens = jnp.where(used, x, 0).astype(dtype)
    mixed = jnp.einsum("tec,t...->ec...", dispatch, tokens).astype(x.dtype)
    # A slot without tokens holds another slot's mean: the expert may be undefined at zero.
    filled = dispatch.any(axis=0)  # [E, C]
    example = jax.lax.stop_gradient(mixed.reshape(-1, *mixed.shape[2:])[jnp.argmax(filled)])
    mixed = jnp.where(along(filled, mixed.ndim), mixed, example[None, None])
    params = gradient_where(filled.any(axis=1), params)
    outputs = jax.vmap(_checked(expert))(params, mixed)  # [E, C, O]
    outputs = jnp.where(along(filled, outputs.ndim), outputs, 0)
    y = jnp.einsum("tec,ec...->t...", combine, outputs.astype(dtype))
    return y.astype(x.dtype)


def _checked(expert: Expert) -> Expert:
    """The expert, refused if it does not return one output for every slot."""

    def apply(params: Params, x: Array) -> Array:
        output = expert(params, x)
        check_array(output)
        check_outputs(output.shape, x.shape[0])
        return output

    return apply
