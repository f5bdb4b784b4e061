"""Rules that balance the load by themselves, without a loss: a bias per expert, or Sinkhorn."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._checks import check_k, check_mask, checked_logits, takes
from moejax._compiling import compiled
from moejax.base import Array, Routing
from moejax.rules.limit import mask_tokens


def sigmoid_top_k(
    logits: Array,
    bias: Array | None = None,
    *,
    k: int,
    num_groups: int = 1,
    kept_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Sends every token to the k experts with the largest ``sigmoid(logits) + bias``.

    ``s = sigmoid(logits)``; the choice is by ``s + b``, the weights are s without b, divided by
    their sum over the k and multiplied by ``scale``. With groups, experts compete only within the
    ``kept_groups`` groups whose two best ``s + b`` have the largest sum.

    Args:
        logits: router output, shape [T, E].
        bias: b, shape [E], no part of the gradient: state that `update_balance_bias` maps to the
            next step's; None for zero.
        k: experts per token.
        num_groups: number of equal groups of neighbouring experts, a divisor of E.
        kept_groups: how many groups a token may choose from.
        renormalize: whether the k weights of a token sum to ``scale``.
        scale: multiplies the weights.

    Returns:
        A decision with K = k, the best ``s + b`` first; scores are s divided by its sum over E.

    Raises:
        ValueError: if shapes or numbers do not agree, or if a single weight is renormalised: it
            is then a constant and the router gets no gradient.

    Example:
        >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
        >>> sigmoid_top_k(logits, k=2).experts
        Array([[0, 1]], dtype=int32)
        >>> sigmoid_top_k(logits, jnp.array([0.0, 0.0, 0.0, 9.0]), k=2).experts
        Array([[3, 0]], dtype=int32)

    References:
        DeepSeek-AI, `DeepSeek-V3 Technical Report <https://arxiv.org/abs/2412.19437>`_, 2024;
        Wang et al., `Auxiliary-Loss-Free Load Balancing <https://arxiv.org/abs/2408.15664>`_, 2024
    """
    logits = checked_logits(logits)
    _check_sigmoid(logits, bias, k, num_groups, kept_groups, renormalize)
    affinity = jax.nn.sigmoid(logits)
    ranked_by = affinity if bias is None else affinity + bias.astype(affinity.dtype)[None]
    # An expert switched off by -inf stays off, although its bias grows while it gets no token.
    ranked_by = jnp.where(logits > -jnp.inf, ranked_by, -jnp.inf)
    if kept_groups < num_groups:
        ranked_by = _only_best_groups(ranked_by, num_groups, kept_groups)
    experts = jax.lax.top_k(ranked_by, k)[1]
    # Softmax of log s is s / sum s, and stays finite where every s underflows.
    log_affinity = jax.nn.log_sigmoid(logits)
    kept = jnp.take_along_axis(log_affinity, experts, axis=-1)
    weights = jax.nn.softmax(kept) if renormalize else jnp.exp(kept)
    return Routing(experts, scale * weights, jax.nn.softmax(log_affinity), logits)


@takes(Routing)
def update_balance_bias(bias: Array, routing: Routing | Array, *, rate: float) -> Array:
    """Moves the bias of `sigmoid_top_k` towards balance, ``b_e + rate sign(mean(n) - n_e)``.

    n_e counts the choices that go to expert e, masked tokens left out. At exact balance nothing
    changes.

    One step of the optimizer may take several decisions: with gradient accumulation, or where
    each device routes tokens of its own. Sum their ``routing.counts`` first, and pass the sum.
    Several layers have a bias each: ``jax.vmap(partial(update_balance_bias, rate=rate))`` maps
    biases and counts [layers, E] to the next biases.

    Args:
        bias: b, shape [E].
        routing: the decision of this step, before capacity drops anything; or counts of choices,
            integers or floats of shape [E].
        rate: the step, such as 1e-3.

    Returns:
        The bias of the next step, shape [E].

    Raises:
        ValueError: if the bias or the counts do not hold one number per expert.

    Example:
        >>> routing = moejax.switch(5.0 * jnp.eye(3)[jnp.array([0, 0, 1])])
        >>> update_balance_bias(jnp.zeros(3), routing, rate=0.5)
        Array([-0.5,  0. ,  0.5], dtype=float32)
        >>> update_balance_bias(jnp.zeros(3), routing.counts + jnp.array([0, 1, 1]), rate=0.5)
        Array([-0.5, -0.5,  0.5], dtype=float32)

    References:
        Wang et al., `Auxiliary-Loss-Free Load Balancing <https://arxiv.org/abs/2408.15664>`_, 2024
    """
    counts = routing.counts if isinstance(routing, Routing) else jnp.asarray(routing)
    if counts.ndim != 1:
        raise ValueError(
            f"The counts must hold one number per expert, [E], got {list(counts.shape)}: sum them "
            "over decisions, and map over layers with `jax.vmap`."
        )
    _check_bias(bias, counts.size)
    return bias + rate * _below_mean(counts).astype(bias.dtype)


@compiled("k", "iterations")
def sinkhorn(
    logits: Array, *, k: int = 1, iterations: int = 20, mask: Array | None = None
) -> Routing:
    """Sends every token to k experts by a plan that loads all experts nearly equally.

    Rows and columns of ``exp(logits)`` are scaled in turn until each token has mass 1 and each
    expert mass T/E; the choice is the k largest of a token's row, and has no gradient. The weights
    are the raw ``p = softmax(logits)``. It works on logarithms, so that no logit overflows.

    The assignment of a token depends on all others: in a causal decoder it leaks the future, and
    evaluation mostly uses `top_k(k=k, renormalize=False)` instead. To switch an expert off, set its
    logits to -inf: the plan makes up for any finite offset.

    Args:
        logits: router output, shape [T, E].
        k: experts per token, between 1 and E.
        iterations: how often columns and rows are scaled.
        mask: False for padding, booleans [T]; such a token goes nowhere and pushes no other.

    Returns:
        A decision with K = k; scores are p.

    Raises:
        ValueError: if logits is not a float array [T, E], if k is out of range, or if the mask is
            not booleans [T].

    Example:
        >>> logits = jnp.array([[2.0, 0.0], [1.0, 0.0]])  # both prefer expert 0
        >>> sinkhorn(logits).experts
        Array([[0],
               [1]], dtype=int32)

    References:
        Clark et al., `Unified Scaling Laws for Routed Language Models
        <https://arxiv.org/abs/2202.01169>`_, 2022; Lewis et al., `BASE Layers
        <https://arxiv.org/abs/2103.16716>`_, 2021
    """
    logits = checked_logits(logits)
    check_k(k, logits)
    scores = jax.nn.softmax(logits)
    # A token that is not a number must not spoil the plan of the others.
    counted = ~jnp.isnan(scores).any(axis=-1)
    if mask is not None:
        check_mask(mask, counted.shape)
        counted = counted & mask
    fixed = jax.lax.stop_gradient(logits)
    price = _expert_prices(fixed, counted, iterations)  # [E]
    experts = jax.lax.top_k(fixed - price[None], k)[1]
    decision = Routing(experts, jnp.take_along_axis(scores, experts, axis=-1), scores, logits)
    return decision if mask is None else mask_tokens(decision, mask)


def _below_mean(counts: Array) -> Array:
    """``sign(mean(n) - n_e)``, [E]; for integers exactly, whose sum may be too large for them."""
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        return jnp.sign(counts.mean() - counts)
    num_experts = counts.size
    nothing = jnp.zeros((), counts.dtype)

    def add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        rest = one[1] + other[1]
        return one[0] + other[0] + rest // num_experts, rest % num_experts

    # The mean as an integer and so many E-ths, added up from n_e / E: no partial sum exceeds it.
    parts = counts // num_experts, counts % num_experts
    mean, rest = jax.lax.reduce(parts, (nothing, nothing), add, (0,))
    return jnp.where(
        counts == mean, jnp.sign(rest).astype(jnp.int32), jnp.where(counts < mean, 1, -1)
    )


def _expert_prices(logits: Array, counted: Array, iterations: int) -> Array:
    # The plan is softmax_e(logits - price) up to the price: Sinkhorn in its dual variable.
    def scale_columns(_: int, price: Array) -> Array:
        plan = jax.nn.log_softmax(logits - price[None])  # rows have mass 1
        plan = jnp.where(counted[:, None], plan, -jnp.inf)
        price = price + jax.nn.logsumexp(plan, axis=0)
        price = price - price.max()
        # An expert that no token can take has price -inf, and its logits minus that are NaN.
        return jnp.where(price > -jnp.inf, price, 0)

    return jax.lax.fori_loop(0, iterations, scale_columns, jnp.zeros(logits.shape[1], logits.dtype))


def _only_best_groups(ranked_by: Array, num_groups: int, kept_groups: int) -> Array:
    num_tokens, num_experts = ranked_by.shape
    # [T, E] -> [T, groups, E / groups], its last axis in full: no -1 can be inferred where T is 0.
    grouped = ranked_by.reshape(num_tokens, num_groups, num_experts // num_groups)
    best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]  # [T, groups, 2]
    # A group of one expert that is left counts for that one; a group of none is out.
    left = best > -jnp.inf
    best = jnp.where(left.any(axis=-1), jnp.where(left, best, 0).sum(axis=-1), -jnp.inf)
    groups = jax.lax.top_k(best, kept_groups)[1]
    every = jnp.arange(num_groups, dtype=groups.dtype)[None, None]
    kept = (groups[..., None] == every).any(axis=1)  # [T, groups]
    # Not zero: with a negative bias, zero would win over every expert that is allowed.
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


def _check_sigmoid(
    logits: Array,
    bias: Array | None,
    k: int,
    num_groups: int,
    kept_groups: int,
    renormalize: bool,
) -> None:
    check_k(k, logits)
    num_experts = logits.shape[-1]
    if bias is not None:
        _check_bias(bias, num_experts)
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"`num_groups` must divide the number of experts ({num_experts}), got {num_groups}."
        )
    if not 1 <= kept_groups <= num_groups or kept_groups * (num_experts // num_groups) < k:
        raise ValueError(
            f"`kept_groups` must be between 1 and `num_groups` ({num_groups}) and leave at least "
            f"k = {k} experts to choose from, got {kept_groups}."
        )
    if k == 1 and renormalize:
        raise ValueError(
            "`sigmoid_top_k(k=1, renormalize=True)` gives every token a constant weight, so the "
            "router gets exactly zero gradient: pass renormalize=False."
        )


def _check_bias(bias: Array, num_experts: int) -> None:
    if bias.shape != (num_experts,):
        raise ValueError(
            f"`bias` must hold one number per expert, [{num_experts}], got {list(bias.shape)}."
        )
