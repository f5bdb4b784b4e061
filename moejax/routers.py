"""Routers beyond a plain layer; what they return goes to the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax._arrays import at_least_float32
from moejax._calling import only_accepted
from moejax._checks import check_count, check_layer, check_widths, is_number
from moejax._comparing import comparable
from moejax.base import Array, Layer, Params
from moejax.layers import linear


@comparable
def noisy(router: Layer, noise_router: Layer) -> Layer:
    r"""A router that also learns how much noise its logits get.

    With R the router and N the noise router, the two arguments of `noisy_top_k` are

    .. math:: l = R(x), \qquad s = \operatorname{softplus}(N(x)) + 10^{-2}

    Args:
        router: ``x [T, D] -> logits [T, E]``.
        noise_router: ``x [T, D] -> [T, E]``, before the softplus.

    Returns:
        A layer with params ``{"router", "noise"}`` and ``apply(params, x, *, key=None)``, which
        gives ``(logits, noise_scale)``. The key goes to the two routers, if they take one; the
        noise itself is drawn by `noisy_top_k`.

    Raises:
        ValueError: if one of them is not a layer.

    Example:
        >>> router = moejax.noisy(moejax.linear(4, 3), moejax.linear(4, 3))
        >>> params = router.init(jax.random.key(0))
        >>> logits, noise_scale = router.apply(params, jnp.ones((2, 4)))
        >>> logits.shape, noise_scale.shape
        ((2, 3), (2, 3))

    References:
        Shazeer et al., `Outrageously Large Neural Networks
        <https://arxiv.org/abs/1701.06538>`_, 2017
    """
    check_layer("router", router)
    check_layer("noise_router", noise_router)

    def init(key: Array) -> Params:
        router_key, noise_key = jax.random.split(key)
        return {"router": router.init(router_key), "noise": noise_router.init(noise_key)}

    def apply(params: Params, x: Array, *, key: Array | None = None) -> tuple[Array, Array]:
        router_key, noise_key = (None, None) if key is None else jax.random.split(key)
        logits = router.apply(params["router"], x, **only_accepted(router, key=router_key))
        raw = noise_router.apply(params["noise"], x, **only_accepted(noise_router, key=noise_key))
        return logits, jax.nn.softplus(at_least_float32(raw)) + 1e-2

    return Layer(init, apply)


@comparable
def biased(router: Layer, num_experts: int) -> Layer:
    """A router with a balance bias beside its logits, ``(l(x), b)``: what `sigmoid_top_k` takes.

    The bias is state, not a parameter: its gradient is zero, and `update_balance_bias` computes it
    for the next step. In a Flax module (``moejax.interop.flax``) it is a separate variable; keep it
    away from an optimizer that decays weights.

    Args:
        router: ``x [T, D] -> logits [T, E]``.
        num_experts: E, how many there are.

    Returns:
        A layer with params ``{"router": ..., "balance_bias": [E]}``, the bias zero at first, and
        ``apply(params, x, *, key=None)``, which gives ``(logits, bias)``.

    Raises:
        ValueError: if the router is not a layer, or ``num_experts`` not a positive integer.

    Example:
        >>> model = moejax.moe(
        ...     moejax.glu(4, 8), biased(moejax.linear(4, 3), 3), num_experts=3,
        ...     route=partial(moejax.sigmoid_top_k, k=2))
        >>> params = model.init(jax.random.key(0))
        >>> y, routing = model.apply(params, jnp.ones((5, 4)))
        >>> bias = params["router"]["balance_bias"]
        >>> moejax.update_balance_bias(bias, routing, rate=1e-3).shape
        (3,)

    References:
        Wang et al., `Auxiliary-Loss-Free Load Balancing <https://arxiv.org/abs/2408.15664>`_, 2024
    """
    check_layer("router", router)
    check_count("num_experts", num_experts)

    def init(key: Array) -> Params:
        bias = jnp.zeros(num_experts, jnp.float32)
        return {"router": router.init(key), "balance_bias": bias}

    def apply(params: Params, x: Array, *, key: Array | None = None) -> tuple[Array, Array]:
        logits = router.apply(params["router"], x, **only_accepted(router, key=key))
        return logits, jax.lax.stop_gradient(params["balance_bias"])

    return Layer(init, apply)


@comparable
def cosine(
    d_model: int, d_projected: int, num_experts: int, *, param_dtype: jnp.dtype = jnp.float32
) -> Layer:
    r"""Logits from direction alone: the cosine between a projected token and each expert's vector.

    .. math:: l_e = e^{\min(\tau, \log 100)} \cos(x W + b, v_e)

    No token and no expert can dominate by its length; the learned scale starts at 2.

    Args:
        d_model: width of x, D.
        d_projected: width P of the space in which directions are compared.
        num_experts: E, how many there are.
        param_dtype: dtype in which the params start.

    Returns:
        A layer with ``apply(params, x [T, D]) -> logits [T, E]`` and three params: ``projection``
        (the params of a `linear` layer), ``directions`` [P, E] and the scalar ``log_scale``.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> router = cosine(8, 4, 3)
        >>> params = router.init(jax.random.key(0))
        >>> logits = router.apply(params, jnp.ones((2, 8)))
        >>> logits.shape, bool(jnp.all(jnp.abs(logits) <= 2))
        ((2, 3), True)

    References:
        Chi et al., `On the Representation Collapse of Sparse Mixture of Experts
        <https://arxiv.org/abs/2204.09179>`_, 2022
    """
    check_count("num_experts", num_experts)
    projection = linear(d_model, d_projected, param_dtype=param_dtype)
    directions_init = jax.nn.initializers.lecun_normal()

    def init(key: Array) -> Params:
        projection_key, directions_key = jax.random.split(key)
        return {
            "projection": projection.init(projection_key),
            "directions": directions_init(directions_key, (d_projected, num_experts), param_dtype),
            "log_scale": jnp.asarray(math.log(2), param_dtype),
        }

    def apply(params: Params, x: Array) -> Array:
        x = at_least_float32(x)
        projected = _unit(projection.apply(params["projection"], x), axis=-1, eps=1e-12)
        directions = _unit(params["directions"].astype(x.dtype), axis=0, eps=1e-12)
        scale = jnp.exp(jnp.minimum(params["log_scale"].astype(x.dtype), math.log(100)))
        return scale * (projected @ directions)  # [T, E]

    return Layer(init, apply)


@comparable
def slots(
    d_model: int, num_experts: int, slots_per_expert: int, *, param_dtype: jnp.dtype = jnp.float32
) -> Layer:
    r"""The router of `soft_slots`: the cosine between a token and each slot's vector.

    .. math:: l_{tec} = \text{scale} \cdot \cos(x_t, \mu_{ec})

    Args:
        d_model: width of x, D.
        num_experts: E, how many there are.
        slots_per_expert: C; ``T / E`` makes as many slots as tokens.
        param_dtype: dtype in which the params start.

    Returns:
        A layer with params ``{"slots": [E, C, D], "scale": []}`` and
        ``apply(params, x [T, D]) -> logits [T, E, C]``.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> router = slots(8, 3, 2)
        >>> router.apply(router.init(jax.random.key(0)), jnp.ones((5, 8))).shape
        (5, 3, 2)

    References:
        Puigcerver et al., `From Sparse to Soft Mixtures of Experts
        <https://arxiv.org/abs/2308.00951>`_, 2023
    """
    check_widths("slots", d_model)
    check_count("num_experts", num_experts)
    check_count("slots_per_expert", slots_per_expert)
    slots_init = jax.nn.initializers.normal(1 / math.sqrt(d_model))

    def init(key: Array) -> Params:
        return {
            "slots": slots_init(key, (num_experts, slots_per_expert, d_model), param_dtype),
            "scale": jnp.ones((), param_dtype),
        }

    def apply(params: Params, x: Array) -> Array:
        x = _unit(at_least_float32(x), axis=-1, eps=1e-6)
        vectors = _unit(params["slots"].astype(x.dtype), axis=-1, eps=1e-6)
        return params["scale"].astype(x.dtype) * jnp.einsum("td,ecd->tec", x, vectors)

    return Layer(init, apply)


def _unit(x: Array, *, axis: int, eps: float) -> Array:
    # eps inside the root: the gradient at a zero vector stays finite.
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + eps)


@comparable
def jittered(router: Layer, *, epsilon: float) -> Layer:
    r"""A router that reads :math:`x \odot u`, u uniform in :math:`[1 - \epsilon, 1 + \epsilon]`.

    Only the router reads it: the experts get x itself. Without a key there is no jitter.

    Args:
        router: ``x [T, D] -> logits``.
        epsilon: half the width of the factor's range, such as 1e-2.

    Returns:
        A layer with the router's params and ``apply(params, x, *, key=None)``.

    Raises:
        ValueError: if the router is not a layer, or epsilon not between 0 and 1: the factor could
            change the sign of x.

    Example:
        >>> router = jittered(moejax.linear(4, 3), epsilon=1e-2)
        >>> params = router.init(jax.random.key(0))
        >>> router.apply(params, jnp.ones((2, 4)), key=jax.random.key(1)).shape
        (2, 3)

    References:
        Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021
    """
    check_layer("router", router)
    if not 0 <= epsilon < 1:
        raise ValueError(f"`epsilon` must be between 0 and 1, got {epsilon}.")

    def apply(params: Params, x: Array, *, key: Array | None = None) -> Any:
        if key is None:
            return router.apply(params, x)
        jitter_key, router_key = jax.random.split(key)
        u = jax.random.uniform(jitter_key, x.shape, x.dtype, 1 - epsilon, 1 + epsilon)
        return router.apply(params, x * u, **only_accepted(router, key=router_key))

    return Layer(router.init, apply)


@comparable
def tempered(router: Layer, *, temperature: Array | float) -> Layer:
    r"""A router with logits :math:`l / \text{temperature}`: below 1 sharper, above 1 softer.

    Args:
        router: ``x [T, D] -> logits``; if it returns several values, only the first is divided.
        temperature: positive; a traced one may be annealed or learned.

    Returns:
        A layer with the router's params.

    Raises:
        ValueError: if the router is not a layer, or the temperature a number that is not positive
            and finite.

    Example:
        >>> router = moejax.Layer(lambda key: {}, lambda params, x: x)
        >>> tempered(router, temperature=2.0).apply({}, jnp.array([[1.0, 3.0]]))
        Array([[0.5, 1.5]], dtype=float32)
    """
    _check_positive("temperature", temperature)
    return _with_logits(router, lambda logits: logits / jnp.asarray(temperature, logits.dtype))


@comparable
def soft_capped(router: Layer, *, cap: Array | float) -> Layer:
    r"""A router whose logits stay within ``±cap`` and hardly change near zero.

    .. math:: \text{cap} \cdot \tanh(l / \text{cap})

    Args:
        router: ``x [T, D] -> logits``; if it returns several values, only the first is capped.
        cap: the bound, positive, such as 30.

    Returns:
        A layer with the router's params.

    Raises:
        ValueError: if the router is not a layer, or the cap a number that is not positive and
            finite.

    Example:
        >>> router = moejax.Layer(lambda key: {}, lambda params, x: x)
        >>> soft_capped(router, cap=30.0).apply({}, jnp.array([[1e4, -1e4]]))
        Array([[ 30., -30.]], dtype=float32)

    References:
        Gemma Team, `Gemma 2 <https://arxiv.org/abs/2408.00118>`_, 2024
    """
    _check_positive("cap", cap)

    def bounded(logits: Array) -> Array:
        bound = jnp.asarray(cap, logits.dtype)
        capped = bound * jnp.tanh(logits / bound)
        return jnp.where(logits == -jnp.inf, -jnp.inf, capped)  # an expert stays switched off

    return _with_logits(router, bounded)


def _check_positive(name: str, value: Array | float) -> None:
    # Numbers only: what an array holds is not known while it is traced.
    if is_number(value) and not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def _with_logits(router: Layer, transform: Callable[[Array], Array]) -> Layer:
    check_layer("router", router)

    def apply(params: Params, x: Array, *, key: Array | None = None) -> Any:
        outputs = router.apply(params, x, **only_accepted(router, key=key))
        logits, *more = outputs if isinstance(outputs, tuple) else (outputs,)
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"A router must return logits that are floats, got {logits.dtype}.")
        return (transform(logits), *more) if isinstance(outputs, tuple) else transform(logits)

    return Layer(router.init, apply)
