"""Rules by which the slots of experts choose tokens, instead of tokens choosing experts.

Both look at all tokens of a call at once. In a causal decoder they leak the future, and a batch
of sequences must be mapped over, ``jax.vmap(model.apply, in_axes=(None, 0))``, so that no
sequence sees another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._arrays import at_least_float32
from moejax._checks import check_mask, checked_logits, is_integer
from moejax._compiling import compiled
from moejax.base import Array, ExpertChoice, SoftSlots


@compiled("capacity")
def expert_choice(logits: Array, *, capacity: int, mask: Array | None = None) -> ExpertChoice:
    r"""Lets every expert take its C best tokens: perfect balance, and no loss for it.

    .. math:: p_t = \operatorname{softmax}(l_t), \qquad
        e \text{ takes the C tokens with the largest } p_{te}

    Tokens are weighted by p. A token may be taken by several experts, or by none, and then gets
    zeros.

    The choice depends on all tokens of the call: it leaks the future in a causal decoder.

    Args:
        logits: router output, shape [T, E].
        capacity: C, tokens per expert, between 1 and T; ``2 T / E`` makes two experts per token
            on average.
        mask: False for padding, booleans [T]; no expert takes such a token.

    Returns:
        A decision for `gather_slots`, the best token of an expert first. A token whose logits
        are not numbers, or all -inf, is taken by no expert, and an expert whose logits are -inf
        takes no token.

    Raises:
        ValueError: if logits is not a float array [T, E], if capacity is out of range, or if the
            mask is not booleans [T].

    Example:
        >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> expert_choice(logits, capacity=1).tokens
        Array([[0],
               [2]], dtype=int32)

    References:
        Zhou et al., `Mixture-of-Experts with Expert Choice Routing
        <https://arxiv.org/abs/2202.09368>`_, 2022
    """
    logits = checked_logits(logits)
    num_tokens = logits.shape[0]
    if not (is_integer(capacity) and 1 <= capacity <= num_tokens):
        raise ValueError(
            f"`capacity` must be an integer between 1 and the number of tokens ({num_tokens}), "
            f"got {capacity!r}."
        )
    # A token for which every expert is switched off is not there, either.
    present = _present(logits, mask) & (logits > -jnp.inf).any(axis=1)  # [T]
    finite = jnp.where(present[:, None], logits, 0)  # before the softmax, for its gradient
    scores = jnp.where(present[:, None], jax.nn.softmax(finite), 0)
    # By logarithms: scores that underflow to zero would tie.
    ranked_by = jnp.where(present[:, None], jax.nn.log_softmax(finite), -jnp.inf)
    rank, tokens = jax.lax.top_k(ranked_by.T, capacity)  # [E, C]
    weights = jnp.take_along_axis(scores.T, tokens, axis=-1)
    # -inf is the rank of an absent token, and of every token at an expert that is switched off.
    return ExpertChoice(jnp.where(rank > -jnp.inf, tokens, num_tokens), weights, scores, logits)


@compiled()
def soft_slots(logits: Array, *, mask: Array | None = None) -> SoftSlots:
    r"""Fills every slot with a mean of all tokens: differentiable in everything, nothing dropped.

    .. math::
        \text{dispatch}_{tec} = \frac{\exp l_{tec}}{\sum_{t'} \exp l_{t'ec}}, \qquad
        \text{combine}_{tec} = \frac{\exp l_{tec}}{\sum_{e'c'} \exp l_{te'c'}}

    The router of this rule is `slots`.

    Every slot sees all tokens of the call: it leaks the future in a causal decoder.

    Args:
        logits: router output, shape [T, E, C].
        mask: False for padding, booleans [T]; such a token is in no slot and gets zeros.

    Returns:
        A decision for `mix_slots`. A token whose logits are not numbers is in no slot, and gets
        zeros.

    Raises:
        ValueError: if logits is not a float array [T, E, C], or the mask is not booleans [T].

    Example:
        >>> decision = soft_slots(jnp.zeros((4, 2, 1)))
        >>> float(decision.dispatch[0, 0, 0]), float(decision.combine[0, 0, 0])
        (0.25, 0.5)

    References:
        Puigcerver et al., `From Sparse to Soft Mixtures of Experts
        <https://arxiv.org/abs/2308.00951>`_, 2023
    """
    if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            "`logits` must be a float array of shape [tokens, experts, slots], got "
            f"{logits.dtype}{list(logits.shape)}: route with the router `slots`."
        )
    logits = at_least_float32(logits)
    present = _present(logits, mask)[:, None, None]  # [T, 1, 1]
    # A slot whose logits are all -inf, as of an expert that is switched off, takes no token.
    dispatch = jax.nn.softmax(logits, axis=0, where=present & (logits > -jnp.inf))
    combine = jax.nn.softmax(logits, axis=(1, 2))
    return SoftSlots(dispatch, jnp.where(present, combine, 0), logits)


def _present(logits: Array, mask: Array | None) -> Array:
    # A token whose logits are not numbers must not take the place of others.
    numbers = ~jnp.isnan(logits).any(axis=range(1, logits.ndim))
    if mask is None:
        return numbers
    check_mask(mask, numbers.shape)
    return numbers & mask
