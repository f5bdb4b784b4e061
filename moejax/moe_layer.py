"""The composed layer: experts, a router, a rule and a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax._arrays import at_least_float32, gradient_if, padded_by_example, where_kept
from moejax._calling import accepts, check_rule, keeps_own, only_accepted
from moejax._checks import (
    check_array,
    check_expert_params,
    check_key,
    check_layer,
    check_mask,
    check_stacked,
)
from moejax._comparing import comparable
from moejax.base import Array, DenseRouting, Layer, Params, Routing, Rule, Schedule
from moejax.layers import stack
from moejax.rules import softmax
from moejax.rules.limit import mask_tokens
from moejax.schedules.dense import dense
from moejax.schedules.dropless import dropless


@comparable
def moe(
    expert: Layer,
    router: Layer,
    *,
    num_experts: int,
    route: Rule = softmax,
    execute: Schedule | None = None,
    feature_ndim: int = 1,
) -> Layer:
    r"""A mixture of experts: gates blend the outputs of E networks.

    .. math:: y_t = \sum_e g_{te}\, E_e(x_t)

    Differentiable in reverse mode any number of times. Forward mode (``jax.jvp``, and with it
    ``jax.hessian``) raises a TypeError where `dropless` or `capacity` runs; to use it, pass
    ``execute=moejax.dense``.

    Args:
        expert: the layer of one expert; any ``f(params, x)`` that treats tokens (axis 0 of x)
            independently of each other.
        router: ``x [T, ...] -> logits [T, E]``. It is given x in float32 or wider. What it returns
            goes to the rule, several values as several arguments.
        num_experts: E, how many there are.
        route: the rule, ``logits -> Routing``.
        execute: the schedule, ``(expert, params, x, routing) -> y``. By default `dense` for a
            `DenseRouting`, and `dropless` for any other.
        feature_ndim: how many trailing axes of x are one token: 1 for vectors, 3 for images.

    Returns:
        A layer with params ``{"router": ..., "experts": ...}``, every leaf of the experts with a
        leading axis E. ``apply(params, x, *, key=None, mask=None)`` takes x ``[..., D]`` and
        returns ``(y, routing)``: y has the leading shape and the dtype of x, and the decision is
        over the T flattened tokens. ``key`` goes to the router and the rule if they take one;
        without it nothing is random. ``mask``, with x's leading shape, is False for padding: such a
        token goes nowhere and gets zeros.

    Raises:
        ValueError: if the expert or the router is not a layer; in apply, at trace time, if shapes
            do not agree.

    Example:
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, 2), num_experts=2)
        >>> params = model.init(jax.random.key(0))
        >>> y, routing = model.apply(params, jnp.ones((5, 2)))
        >>> y.shape, routing.weights.shape
        ((5, 1), (5, 2))

    References:
        Jacobs et al., `Adaptive Mixtures of Local Experts
        <https://doi.org/10.1162/neco.1991.3.1.79>`_, 1991
    """
    check_layer("expert", expert)
    experts = stack(expert, num_experts)

    def apply(params: Params, tokens: Array, decision: Any) -> Array:
        check_stacked(params, num_experts)
        schedule = execute or default_schedule(decision)
        return schedule(expert.apply, params, tokens, decision)

    return routed(
        Layer(experts.init, apply),
        router,
        num_experts=num_experts,
        route=route,
        feature_ndim=feature_ndim,
        check=check_expert_params,
    )


@comparable
def routed(
    experts: Layer,
    router: Layer,
    *,
    num_experts: int,
    route: Rule,
    feature_ndim: int,
    check: Callable[[Params, int], None] = lambda params, num_experts: None,
) -> Layer:
    """The layer of `moe`, once its experts know how to run a decision.

    Args:
        experts: all experts at once, ``apply(params, x [T, ...], decision) -> y [T, ...]``.
        router: as in `moe`.
        num_experts: E, how many there are.
        route: as in `moe`.
        feature_ndim: as in `moe`.
        check: refuses parameters of the experts that do not fit E, before the router runs.

    Returns:
        The layer of `moe`.
    """
    check_layer("router", router)

    def init(key: Array) -> Params:
        check_key(key)
        router_key, experts_key = jax.random.split(key)
        return {"router": router.init(router_key), "experts": experts.init(experts_key)}

    def apply(
        params: Params, x: Array, *, key: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, Any]:
        x = jnp.asarray(x)
        tokens, leading = flatten_tokens(x, feature_ndim)
        if mask is not None:
            mask = jnp.asarray(mask)
            check_mask(mask, leading)
            mask = mask.reshape(-1)  # [T]
            tokens = padded_by_example(tokens, mask)
            params = gradient_if(mask.any(), params)
        check(params["experts"], num_experts)
        with jax.named_scope("route"):
            decision = _decide(router, route, params["router"], tokens, num_experts, key, mask)
        with jax.named_scope("execute"):
            y = experts.apply(params["experts"], tokens, decision)
        if mask is not None:
            y = where_kept(mask, y)
        return unflatten_tokens(y, x, leading), decision

    return Layer(init, apply)


def flatten_tokens(x: Array, feature_ndim: int) -> tuple[Array, tuple[int, ...]]:
    """Tokens on one axis, ``[..., D] -> [T, D]``, and the shape they had."""
    if x.ndim <= feature_ndim:
        raise ValueError(
            f"`x` must have at least one axis of tokens before its {feature_ndim} feature "
            f"axes (`feature_ndim`), got shape {x.shape}: add one with x[None]."
        )
    split = x.ndim - feature_ndim
    leading, features = x.shape[:split], x.shape[split:]
    placed = jax.typeof(x).sharding.spec
    devices = jax.tree.leaves(tuple(placed[:split]))
    placement = P(tuple(devices), *placed[split:])
    return _reshaped(x, (math.prod(leading), *features), placement), leading


def unflatten_tokens(y: Array, x: Array, leading: tuple[int, ...]) -> Array:
    """The tokens' own axes again, ``[T, O] -> [..., O]``, placed on a mesh as those of x are."""
    placement = P(*jax.typeof(x).sharding.spec[: len(leading)], *jax.typeof(y).sharding.spec[1:])
    return _reshaped(y, (*leading, *y.shape[1:]), placement)


def _reshaped(x: Array, shape: tuple[int, ...], placement: P) -> Array:
    """A reshape that says where its result lies, if x lies on a mesh with Explicit axes."""
    placed = jax.typeof(x).sharding
    if x.shape == shape or not jax.tree.leaves(tuple(placed.spec)):
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(placed.mesh, placement))


def _decide(
    router: Layer,
    route: Rule,
    params: Params,
    tokens: Array,
    num_experts: int,
    key: Array | None,
    mask: Array | None,
) -> Any:
    router_key, route_key = (None, None) if key is None else jax.random.split(key)
    keyed = only_accepted(router, key=router_key)
    outputs = router.apply(params, _router_input(tokens), **keyed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    _check_logits(outputs[0], tokens.shape[0], num_experts)
    extras = {"key": route_key, "mask": mask}
    given = {k: v for k, v in extras.items() if accepts(route, k) and not keeps_own(route, k, v)}
    check_rule(route, outputs, given)
    decision = route(*outputs, **given)
    if mask is None or accepts(route, "mask"):
        return decision
    return mask_tokens(decision, mask)


def _router_input(tokens: Array) -> Array:
    return at_least_float32(tokens) if jnp.issubdtype(tokens.dtype, jnp.floating) else tokens


def _check_logits(logits: Array, num_tokens: int, num_experts: int) -> None:
    if not hasattr(logits, "shape"):
        raise ValueError(
            "The router must return logits, an array, or a tuple that begins with them, got a "
            f"{type(logits).__name__}: only the outermost router may be `noisy` or `biased`."
        )
    if logits.shape[:2] != (num_tokens, num_experts):
        raise ValueError(
            f"The router must return one logit per token and expert, [{num_tokens}, "
            f"{num_experts}], got {list(logits.shape)}: its last width must equal `num_experts`."
        )


def default_schedule(decision: Any) -> Schedule:
    """The schedule that fits a decision's type."""
    if not isinstance(decision, Routing):
        raise ValueError(
            f"A decision of type {type(decision).__name__} needs its own schedule: pass it to "
            "`moe` as `execute`."
        )
    return dense if isinstance(decision, DenseRouting) else dropless


@comparable
def outputs_of(layer: Layer) -> Layer:
    """A layer that returns only its output, so that a mixture can be an expert of a mixture.

    Only the outer decision then remains as evidence: the losses cannot read the inner ones.

    Args:
        layer: one whose apply returns ``(y, decision)``, as from `moe`; its y has the shape
            [T, ...] for x [T, ...].

    Returns:
        A layer with the same params, and ``apply(params, x) -> y``.

    Raises:
        ValueError: if the layer is none; in apply, if it returns only its output.

    Example:
        >>> inner = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 2), num_experts=2)
        >>> outer = moejax.moe(outputs_of(inner), moejax.linear(4, 3), num_experts=3)
        >>> y, routing = outer.apply(outer.init(jax.random.key(0)), jnp.ones((5, 4)))
        >>> y.shape, routing.num_experts
        ((5, 4), 3)

    References:
        Jordan & Jacobs, `Hierarchical Mixtures of Experts and the EM Algorithm
        <https://doi.org/10.1162/neco.1994.6.2.181>`_, 1994
    """
    check_layer("layer", layer)

    def apply(params: Params, x: Array) -> Array:
        output = layer.apply(params, x)
        if not isinstance(output, tuple):
            raise ValueError(
                "`outputs_of` takes a layer that returns its output and a decision, as `moe` does; "
                "this one returns its output alone: use it as it is."
            )
        return output[0]

    return Layer(layer.init, apply)


@comparable
def with_shared(model: Layer, shared: Layer, *, feature_ndim: int = 1) -> Layer:
    r"""A mixture beside an expert S that always runs.

    .. math:: y_t = S(x_t) + \sum_e g_{te}\, E_e(x_t)

    Args:
        model: the mixture, as from `moe`.
        shared: the layer of the shared expert, with the mixture's input and output width.
        feature_ndim: how many trailing axes of x are one token, as in ``model``.

    Returns:
        A layer with params ``{"routed": ..., "shared": ...}`` that is applied as ``model`` is.

    Raises:
        ValueError: if one of them is not a layer; in apply, if the model returns no decision or the
            shared expert one, or if the two outputs differ in shape.

    Example:
        >>> routed = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 3), num_experts=3)
        >>> model = with_shared(routed, moejax.glu(4, 16))
        >>> y, routing = model.apply(model.init(jax.random.key(0)), jnp.ones((2, 5, 4)))
        >>> y.shape
        (2, 5, 4)

    References:
        Dai et al., `DeepSeekMoE <https://arxiv.org/abs/2401.06066>`_, 2024
    """
    check_layer("model", model)
    check_layer("shared", shared)

    def init(key: Array) -> Params:
        routed_key, shared_key = jax.random.split(key)
        return {"routed": model.init(routed_key), "shared": shared.init(shared_key)}

    def apply(
        params: Params, x: Array, *, key: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, Any]:
        options = {"key": key, "mask": mask}
        given = {name: value for name, value in options.items() if value is not None}
        output = model.apply(params["routed"], x, **given)
        if not isinstance(output, tuple):
            raise ValueError(
                "The model of `with_shared` must return its output and a decision, as `moe` does, "
                "got its output alone."
            )
        y, decision = output
        x = jnp.asarray(x)
        tokens, leading = flatten_tokens(x, feature_ndim)
        if mask is not None:
            mask = jnp.asarray(mask)
            tokens = padded_by_example(tokens, mask.reshape(-1))
            params = gradient_if(mask.any(), params)
        always = shared.apply(params["shared"], tokens)
        check_array(always)
        always = unflatten_tokens(always, x, leading).astype(y.dtype)
        if always.shape != y.shape:
            raise ValueError(
                f"The shared expert's output must have the shape of the mixture's output, "
                f"{list(y.shape)}, got {list(always.shape)}."
            )
        return y + (always if mask is None else where_kept(mask, always)), decision

    return Layer(init, apply)
