"""Rules that balance the load by themselves, without a loss: a bias per expert, or Sinkhorn."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax._arrays import at_least_float32
from moejax._checks import check_count, check_k, check_mask, checked_logits, takes
from moejax._compiling import compiled
from moejax.base import Array, Routing
from moejax.rules.by_score import Groups, check_bias, check_choice, choose, k_best, of_choices
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
    r"""Sends every token to the k experts with the largest ``sigmoid(logits) + bias``.

    `by_score` with a sigmoid, normalised by logarithms: it stays exact where scores underflow.
    Without a bias or groups it ranks by the logits, which still tell experts apart when their
    sigmoids are rounded to one.

    .. math::
        s_t = \sigma(l_t), \qquad e \in \text{top k of } s_t + b, \qquad
        g_{te} = \text{scale} \cdot \frac{s_{te}}{\sum_{j \in \text{top k}} s_{tj}}

    Experts are chosen by s + b, and weighted by s without b. With groups, experts compete only
    within the ``kept_groups`` groups whose two best ``s + b`` have the largest sum.

    Args:
        logits: router output, shape [T, E].
        bias: b, shape [E], state without a gradient, which `update_balance_bias` updates after
            each step; None for zero.
        k: experts per token.
        num_groups: number of equal groups of neighbouring experts, a divisor of E.
        kept_groups: how many groups a token may choose from.
        renormalize: whether the k weights of a token sum to ``scale``.
        scale: multiplies the weights.

    Returns:
        A decision with K = k, the best ``s + b`` first; scores are s divided by its sum over E.
        Where -inf leaves a token fewer than k experts, its other choices go nowhere.

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
    groups = Groups(num_groups, kept_groups)
    check_choice("sigmoid_top_k", logits, bias, k, groups, renormalize)
    return _sigmoid_top_k(logits, bias, scale, k, groups, renormalize)


@compiled("k", "groups", "renormalize")
def _sigmoid_top_k(
    logits: Array,
    bias: Array | None,
    scale: Array | float,
    k: int,
    groups: Groups,
    renormalize: bool,
) -> Routing:
    alone = bias is None and groups.kept == groups.num
    experts = choose(logits, logits if alone else jax.nn.sigmoid(logits), bias, k, groups)
    # Softmax of log s is s / sum s, and stays finite where every s underflows.
    log_affinity = jax.nn.log_sigmoid(logits)
    kept = of_choices(log_affinity, experts, -jnp.inf)
    weights = jax.nn.softmax(kept) if renormalize else jnp.exp(kept)
    return Routing(experts, scale * weights, jax.nn.softmax(log_affinity), logits)


@takes(Routing)
def update_balance_bias(bias: Array, routing: Routing | Array, *, rate: float) -> Array:
    r"""Moves the bias of `sigmoid_top_k` towards balance.

    .. math:: b_e \leftarrow b_e + \text{rate} \cdot \operatorname{sign}(\bar n - n_e)

    :math:`n_e` counts the choices that go to expert e, without masked tokens. At exact balance
    nothing changes.

    One step of the optimizer may take several decisions: with gradient accumulation, or where
    each device routes its own tokens. Sum their ``routing.counts`` first, and pass the sum. With
    several layers, each has its own bias: ``jax.vmap(partial(update_balance_bias, rate=rate))``
    maps biases and counts [layers, E] to the next biases.

    Args:
        bias: b, shape [E].
        routing: the decision of this step, before capacity drops anything; or counts of choices,
            integers or floats of shape [E].
        rate: the step, such as 1e-3.

    Returns:
        The bias of the next step, shape [E].

    Raises:
        ValueError: if the bias or the counts do not hold one number per expert, or if the bias is
            narrower than float32.

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
    check_bias(bias, counts.size)
    if at_least_float32(bias).dtype != bias.dtype:
        raise ValueError(
            f"`bias` must be float32 or wider, as its steps are small, got {bias.dtype}: leave it "
            "out where you cast params."
        )
    return bias + rate * _below_mean(counts).astype(bias.dtype)


@compiled("k", "iterations")
def sinkhorn(
    logits: Array, *, k: int = 1, iterations: int = 20, mask: Array | None = None
) -> Routing:
    r"""Sends every token to k experts by a plan that loads all experts nearly equally.

    Rows and columns of ``exp(logits)`` are scaled in turn until each token has mass 1 and each
    expert mass T/E,

    .. math:: \pi_{te} = u_t\, e^{l_{te}}\, v_e, \qquad \sum_e \pi_{te} = 1, \qquad
        \sum_t \pi_{te} = T / E

    The choice is the k largest of a token's row, and has no gradient. The weights are the raw
    probabilities, ``p = softmax(logits)``. The plan is computed in logarithms, so that no logit
    overflows.

    The assignment of a token depends on all others: in a causal decoder it leaks the future, and
    evaluation usually uses `top_k` with ``renormalize=False`` instead. To switch an expert off, set
    its logits to -inf: the plan makes up for any finite offset.

    Args:
        logits: router output, shape [T, E].
        k: experts per token, between 1 and E.
        iterations: how often columns and rows are scaled, at least once.
        mask: False for padding, booleans [T]; such a token goes nowhere and displaces no other.

    Returns:
        A decision with K = k; scores are p. Where -inf leaves a token fewer than k experts, its
        other choices go nowhere.

    Raises:
        ValueError: if logits is not a float array [T, E], if k or iterations is out of range, or if
            the mask is not booleans [T].

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
    check_count("iterations", iterations)
    scores = jax.nn.softmax(logits)
    # A token whose logits are not numbers must not spoil the plan of the others.
    counted = ~jnp.isnan(scores).any(axis=-1)
    if mask is not None:
        check_mask(mask, counted.shape)
        counted = counted & mask
    fixed = jax.lax.stop_gradient(logits)
    price = _expert_prices(fixed, counted, iterations)  # [E]
    experts = k_best(fixed - price[None], k)
    decision = Routing(experts, of_choices(scores, experts, 0), scores, logits)
    return decision if mask is None else mask_tokens(decision, mask)


def _below_mean(counts: Array) -> Array:
    """``sign(mean(n) - n_e)``, [E]; exact for integers, even where their sum would overflow."""
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        return jnp.sign(counts.mean() - counts)
    num_experts = counts.size
    nothing = jnp.zeros((), counts.dtype)

    def add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        rest = one[1] + other[1]
        return one[0] + other[0] + rest // num_experts, rest % num_experts

    # The mean as an integer plus a number of E-ths, summed over n_e / E: no partial sum exceeds it.
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

    return jax.lax.fori_loop(
        0, iterations, scale_columns, jnp.zeros_like(logits, shape=logits.shape[1:])
    )
