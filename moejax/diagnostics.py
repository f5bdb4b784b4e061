"""What a decision shows: load, entropy, specialisation. Pure functions; masked tokens do not count.

Read them off the decision before capacity drops any choice, or a collapse looks balanced.
A choice of weight zero does not count: a token of `relu` without a positive logit chooses no
expert, and the means of gates leave it out.
Entropies and information are in nats.
"""

from __future__ import annotations

import jax.numpy as jnp

from moejax._arrays import at_least_float32, by_expert, indices
from moejax._checks import takes
from moejax._compiling import compiled
from moejax.base import Array, Routing
from moejax.losses import entropy, mean_over_kept
from moejax.rules.by_score import to_sum_one


@takes(Routing)
@compiled()
def expert_load(routing: Routing) -> Array:
    r"""The share of all choices that goes to each expert.

    .. math:: f_e = \frac{n_e}{\sum_j n_j}

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        Shares that sum to one (zeros if no token counts), shape [E].

    Example:
        >>> expert_load(moejax.switch(jnp.eye(2)))
        Array([0.5, 0.5], dtype=float32)
    """
    counts = _active(routing).astype(routing.weights.dtype)
    return counts / jnp.maximum(counts.sum(), 1)


@takes(Routing)
@compiled()
def dead_experts(routing: Routing) -> Array:
    """How many experts no token chose.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        An integer scalar between 0 and E.

    Example:
        >>> int(dead_experts(moejax.switch(jnp.array([[2.0, 1.0, 0.0]]))))
        2
    """
    return jnp.sum(_active(routing) == 0)


@takes(Routing)
@compiled()
def share_dropped(before: Routing, after: Routing) -> Array:
    r"""The share of choices that found no slot.

    .. math:: 1 - \frac{n_{after}}{n_{before}}

    Args:
        before: the rule's decision.
        after: what `limit_capacity` left of it.

    Returns:
        A scalar between 0 and 1.

    Example:
        >>> before = moejax.switch(jnp.array([[1.0, 0.0]] * 4))
        >>> float(share_dropped(before, moejax.limit_capacity(before, capacity=1)))
        0.75
    """
    dtype = before.weights.dtype
    chosen, served = (_active(each).sum().astype(dtype) for each in (before, after))
    return (chosen - served) / jnp.maximum(chosen, 1)


@takes(Routing)
@compiled()
def gate_entropy(routing: Routing) -> Array:
    r"""The mean entropy of a token's gates, normalised to sum to one.

    .. math:: \frac{1}{T} \sum_t H(g_t), \qquad H(g) = -\sum_e g_e \log g_e

    The mean is over the T tokens that have a gate.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar between 0 (one expert per token) and log K (equal gates).

    Example:
        >>> f"{gate_entropy(moejax.softmax(jnp.zeros((3, 4)))):.4f}"  # log 4
        '1.3863'
    """
    gates = to_sum_one(routing.gates)
    return _mean_where_gated(gates, entropy(gates))


@takes(Routing)
@compiled()
def confidence(routing: Routing) -> Array:
    r"""The mean of a token's largest gate, its gates normalised to sum to one.

    .. math:: \frac{1}{T} \sum_t \max_e g_{te}

    The mean is over the T tokens that have a gate.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar between 1/K (equal gates) and 1.

    Example:
        >>> float(confidence(moejax.softmax(jnp.zeros((3, 4)))))
        0.25
    """
    gates = to_sum_one(routing.gates)
    return _mean_where_gated(gates, gates.max(axis=-1))


@takes(Routing)
@compiled()
def effective_experts(routing: Routing) -> Array:
    r"""How many experts share the work: the perplexity of the mean gate.

    .. math:: \exp H\left( \frac{1}{T} \sum_t g_t \right)

    The mean is over the T tokens that have a gate; each token's gates are normalised to sum to one.

    Args:
        routing: a decision of T tokens among E experts.

    Returns:
        A scalar between 1 (collapse) and E (balance).

    Example:
        >>> f"{effective_experts(moejax.switch(jnp.eye(3))):.4f}"
        '3.0000'
    """
    gates = to_sum_one(routing.gates)
    return jnp.exp(entropy(_mean_where_gated(gates, gates)))


@takes(Routing)
def expert_by_class(routing: Routing, labels: Array, num_classes: int) -> Array:
    r"""Which expert serves which class: the gate mass of every pair.

    .. math:: \text{table}_{ec} = \sum_{t\,:\,\text{label}_t = c} g_{te}

    A token's gates are normalised to sum to one, so that a column sums to the number of tokens of
    its class that reach an expert. A token without any gate reaches none.

    Args:
        routing: a decision of T tokens among E experts.
        labels: the class of every token, integers [T]. A token whose label is outside of
            [0, classes), such as -1 for unknown, is left out.
        num_classes: how many classes there are.

    Returns:
        The table, shape [E, classes].

    Raises:
        ValueError: if there is not one integer label per token.

    Example:
        >>> expert_by_class(moejax.switch(3 * jnp.eye(2)), jnp.array([0, 2]), 3)
        Array([[1., 0., 0.],
               [0., 0., 1.]], dtype=float32)
    """
    gates = to_sum_one(routing.gates)  # [T, E]
    if labels.shape != gates.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"`labels` must hold one integer per token, [{gates.shape[0]}], got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    table = jnp.zeros((num_classes, routing.num_experts), gates.dtype)
    labels = indices(labels)
    # As an index, a negative label would count from the end.
    gates = jnp.where((labels >= 0)[:, None], gates, 0)
    return table.at[labels].add(gates, mode="drop").T


@compiled()
def mutual_information(table: Array) -> Array:
    r"""How much the expert tells about the class.

    .. math:: I = \sum_{ec} p_{ec} \log \frac{p_{ec}}{p_e\, p_c}

    Args:
        table: non-negative masses, shape [E, classes], as from `expert_by_class`, or counts.

    Returns:
        A scalar in nats, between 0 (independent) and ``min(log E, log classes)``.

    Example:
        >>> f"{mutual_information(jnp.eye(2)):.4f}"  # log 2
        '0.6931'
    """
    table = at_least_float32(table)
    joint = table / jnp.maximum(table.sum(), jnp.finfo(table.dtype).tiny)
    information = entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint.ravel())
    return jnp.maximum(information, 0)  # rounding can leave it just below


def _active(routing: Routing) -> Array:
    """How many choices that have a weight go to each expert, int32 [E]."""
    active = (routing.weights != 0).astype(jnp.int32)
    return by_expert(routing.experts, active, routing.num_experts).sum(axis=0, dtype=jnp.int32)


def _mean_where_gated(gates: Array, values: Array) -> Array:
    """The mean of values [T, ...] over the tokens that have a gate, which padding does not."""
    return mean_over_kept(gates.any(axis=-1), values)
