"""Routing by a fixed table: nothing is learned, and the table alone decides the balance."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._arrays import indices
from moejax._checks import checked_logits
from moejax._compiling import compiled
from moejax.base import Array, Routing


@compiled()
def hashed(logits: Array, *, token_ids: Array, table: Array) -> Routing:
    r"""Sends every token to the expert that a table holds for its id, with weight one.

    .. math:: e_t = \text{table}[\text{id}_t]

    The logits only say how many experts there are: a router that returns zeros is enough.

    Args:
        logits: router output, shape [T, E].
        token_ids: vocabulary ids of the tokens, integers [T].
        table: the expert of every id, integers [V], such as
            ``jax.random.permutation(key, V) % E``. An id outside of [0, V) goes nowhere, and so
            does one whose entry is outside of [0, E).

    Returns:
        A decision with K = 1; scores are one at the expert and zero elsewhere.

    Raises:
        ValueError: if logits is not a float array [T, E], or ids and table are not integers with
            one id per token, or the table is empty.

    Example:
        >>> route = partial(hashed, token_ids=jnp.array([5, 2, 5]), table=jnp.arange(6) % 4)
        >>> route(jnp.zeros((3, 4))).experts.ravel()
        Array([1, 2, 1], dtype=int32)

    References:
        Roller et al., `Hash Layers For Large Sparse Models
        <https://arxiv.org/abs/2106.04426>`_, 2021
    """
    logits = checked_logits(logits)
    num_tokens, num_experts = logits.shape
    integers = all(jnp.issubdtype(a.dtype, jnp.integer) for a in (token_ids, table))
    if token_ids.shape != (num_tokens,) or table.ndim != 1 or not table.size or not integers:
        raise ValueError(
            f"`token_ids` must be integers of shape [{num_tokens}] and `table` integers of shape "
            f"[vocabulary], not empty, got {token_ids.dtype}{list(token_ids.shape)} and "
            f"{table.dtype}{list(table.shape)}."
        )
    token_ids = indices(token_ids)
    experts = table.astype(jnp.int32).at[token_ids].get(mode="fill", fill_value=num_experts)
    # Checked here: as an index, a negative number would count from the end.
    inside = (token_ids >= 0) & (experts >= 0) & (experts < num_experts)
    experts = jnp.where(inside, experts, num_experts)[:, None]  # [T, 1]
    scores = jax.nn.one_hot(experts[:, 0], num_experts, dtype=logits.dtype)
    return Routing(experts, (experts < num_experts).astype(logits.dtype), scores, logits)
