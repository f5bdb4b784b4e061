"""Experts of several kinds behind one router, and an expert that always runs.

A *bank* is a number of experts of one kind: networks, or experts that cost nothing because they
return zero, the token itself or a learned vector. They are chosen like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax._arrays import at_least_float32, blend_dtype, gradient_where, output_dtype, where_kept
from moejax._checks import check_count, check_layer, check_stacked, check_widths, takes
from moejax._comparing import comparable
from moejax.base import Array, Layer, Params, Routing, Rule, Schedule
from moejax.layers import stack
from moejax.moe_layer import default_schedule, routed


class Bank(NamedTuple):
    """Experts of one kind.

    Attributes:
        num_experts: how many.
        init: ``key -> params``.
        apply: ``(params, x [T, ...], routing) -> y``, the gated sum over these experts, of shape
            [T, ...], or a scalar zero; ids in routing count from this bank's first expert,
            and an id of num_experts stands for an expert of another bank.

    Example:
        >>> bank = networks(moejax.linear(3, 2), 4)
        >>> bank.num_experts, bank.init(jax.random.key(0))["kernel"].shape
        (4, (4, 3, 2))
    """

    num_experts: int
    init: Callable[[Array], Params]
    apply: Callable[[Params, Array, Routing], Array]


@comparable
def networks(expert: Layer, num_experts: int, *, execute: Schedule | None = None) -> Bank:
    """Experts that are networks, as in `moe`.

    Args:
        expert: the layer of one expert.
        num_experts: how many.
        execute: the schedule, ``(expert, params, x, routing) -> y``; by default as in `moe`.
            `capacity` counts all T K choices for its slots, even those that go to other banks:
            multiply its factor by the share of choices that this bank should serve.

    Returns:
        A bank whose params are those of ``stack(expert, num_experts)``.

    Raises:
        ValueError: if the expert is not a layer, or ``num_experts`` not a positive integer.

    Example:
        >>> networks(moejax.glu(4, 8), 6).num_experts
        6
    """
    check_layer("expert", expert)

    def apply(params: Params, x: Array, routing: Routing) -> Array:
        check_stacked(params, num_experts)
        schedule = execute or default_schedule(routing)
        return schedule(expert.apply, params, x, routing)

    return Bank(num_experts, stack(expert, num_experts).init, apply)


@comparable
def zero_experts(num_experts: int) -> Bank:
    """Experts that return zero, :math:`E(x) = 0`: a token that chooses one leaves that choice out.

    Args:
        num_experts: how many.

    Returns:
        A bank without params.

    Raises:
        ValueError: if ``num_experts`` is not a positive integer.

    Example:
        >>> zero_experts(1).num_experts
        1

    References:
        Jin et al., `MoE++ <https://arxiv.org/abs/2410.07348>`_, 2024
    """
    check_count("num_experts", num_experts)
    return Bank(num_experts, lambda key: {}, lambda params, x, routing: jnp.zeros((), x.dtype))


@comparable
def copy_experts(num_experts: int) -> Bank:
    """Experts that return the token, :math:`E(x) = x`: a token that chooses one skips the layer.

    Args:
        num_experts: how many.

    Returns:
        A bank without params; the layer's output is then as wide as its input.

    Raises:
        ValueError: if ``num_experts`` is not a positive integer.

    Example:
        >>> copy_experts(1).num_experts
        1

    References:
        Jin et al., `MoE++ <https://arxiv.org/abs/2410.07348>`_, 2024
    """
    check_count("num_experts", num_experts)

    def apply(params: Params, x: Array, routing: Routing) -> Array:
        weights = jnp.where(routing.chosen, routing.weights, 0).sum(axis=-1)  # [T]
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        dtype = np.promote_types(weights.dtype, x.dtype) if floats else weights.dtype
        return weights.astype(dtype).reshape(-1, *[1] * (x.ndim - 1)) * x.astype(dtype)

    return Bank(num_experts, lambda key: {}, apply)


@comparable
def constant_experts(num_experts: int, width: int) -> Bank:
    """Experts that return a learned vector whatever the token, :math:`E_e(x) = v_e`.

    Args:
        num_experts: how many.
        width: of the layer's output, O.

    Returns:
        A bank with params ``{"vectors": [E, O]}``, zero at first.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> constant_experts(2, 4).init(jax.random.key(0))["vectors"].shape
        (2, 4)

    References:
        Jin et al., `MoE++ <https://arxiv.org/abs/2410.07348>`_, 2024
    """
    check_count("num_experts", num_experts)
    check_widths("constant_experts", width)

    def init(key: Array) -> Params:
        return {"vectors": jnp.zeros((num_experts, width), jnp.float32)}

    def apply(params: Params, x: Array, routing: Routing) -> Array:
        check_stacked(params, num_experts)
        gates, vectors = routing.gates, params["vectors"]  # [T, E], [E, O]
        # Zero times infinity is not zero: an expert that no token gives weight is not read.
        used = gates.any(axis=0)
        vectors = where_kept(used, gradient_where(used, vectors))
        dtype = blend_dtype(gates, vectors)
        return gates.astype(dtype) @ vectors.astype(dtype)

    return Bank(num_experts, init, apply)


@comparable
def moe_of(*banks: Bank, router: Layer, route: Rule, feature_ndim: int = 1) -> Layer:
    r"""A mixture of experts of several kinds behind one router.

    .. math:: y_t = \sum_{\text{banks}} \sum_{e \in \text{bank}} g_{te}\, E_e(x_t)

    Expert ids run through the banks in their order. The sum of each bank is rounded to the dtype of
    x, and then they are added up in float32 or wider.

    Args:
        *banks: from `networks`, `zero_experts`, `copy_experts`, `constant_experts`.
        router: ``x [T, ...] -> logits [T, E]``, where E counts the experts of all banks.
        route: the rule, ``logits -> Routing``.
        feature_ndim: how many trailing axes of x are one token.

    Returns:
        A layer as from `moe`, whose ``params["experts"]`` is a list with the params of each bank.

    Raises:
        ValueError: if there is no bank; in apply, if the parameters are of another number of banks,
            or the outputs not of one shape.

    Example:
        >>> model = moe_of(
        ...     networks(moejax.glu(4, 8), 4), zero_experts(1), copy_experts(1),
        ...     constant_experts(2, 4),
        ...     router=moejax.linear(4, 8), route=partial(moejax.top_k, k=2),
        ... )
        >>> y, routing = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 4)))
        >>> y.shape, routing.num_experts
        ((5, 4), 8)

    References:
        Jin et al., `MoE++ <https://arxiv.org/abs/2410.07348>`_, 2024
    """
    if not banks:
        raise ValueError("`moe_of` needs at least one bank of experts, such as `networks`.")
    *starts, num_experts = accumulate((bank.num_experts for bank in banks), initial=0)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, len(banks))
        return [bank.init(one) for bank, one in zip(banks, keys, strict=True)]

    @takes(Routing)
    def apply(params: Params, x: Array, routing: Routing) -> Array:
        if len(params) != len(banks):
            raise ValueError(
                f"The parameters must be those of {len(banks)} banks, got {len(params)}."
            )
        outputs = [
            at_least_float32(bank.apply(own, x, _own_part(routing, start, bank.num_experts)))
            for bank, own, start in zip(banks, params, starts, strict=True)
        ]
        _check_one_shape(outputs)
        y = sum(outputs[1:], start=outputs[0])
        return y.astype(output_dtype(x, y))

    experts = Layer(init, apply)
    return routed(experts, router, num_experts=num_experts, route=route, feature_ndim=feature_ndim)


def _check_one_shape(outputs: list[Array]) -> None:
    shapes = {y.shape for y in outputs if y.ndim}  # a scalar zero fits any
    if len(shapes) != 1:
        raise ValueError(
            "The banks must have outputs of one shape, and not all be `zero_experts`, got "
            f"{[list(y.shape) for y in outputs]}."
        )


def _own_part(routing: Routing, start: int, num_experts: int) -> Routing:
    # A choice of another bank goes nowhere. K stays that of all banks, in a `DenseRouting`, too.
    own = (routing.experts >= start) & (routing.experts < start + num_experts)
    columns = slice(start, start + num_experts)
    return routing._replace(
        experts=jnp.where(own, routing.experts - start, num_experts),
        weights=jnp.where(own, routing.weights, 0),
        scores=routing.scores[:, columns],
        logits=routing.logits[:, columns],
        chances=None,
    )
