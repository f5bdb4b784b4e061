"""Routers beyond a plain layer: what they return goes to the rule."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moejax.experts import check_count, check_widths, linear
from moejax.transforms import only_accepted
from moejax.types import Array, Layer, Params, at_least_float32


def noisy(router: Layer, noise_router: Layer) -> Layer:
    """A router that also learns how much noise its logits get.

    ``logits = router(x)`` and ``noise_scale = softplus(noise_router(x)) + 1e-2``: the two
    arguments of `noisy_top_k`.

    Args:
        router: ``x [T, D] -> logits [T, E]``.
        noise_router: ``x [T, D] -> [T, E]``, before the softplus.

    Returns:
        A layer with params ``{"router", "noise"}`` and ``apply(params, x, *, key=None)``, which
        gives ``(logits, noise_scale)``. The key goes to the two routers, if they take one; the
        noise itself is drawn by `noisy_top_k`.

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

    def init(key: Array) -> Params:
        router_key, noise_key = jax.random.split(key)
        return {"router": router.init(router_key), "noise": noise_router.init(noise_key)}

    def apply(params: Params, x: Array, *, key: Array | None = None) -> tuple[Array, Array]:
        router_key, noise_key = (None, None) if key is None else jax.random.split(key)
        logits = router.apply(params["router"], x, **only_accepted(router, key=router_key))
        raw = noise_router.apply(params["noise"], x, **only_accepted(noise_router, key=noise_key))
        return logits, jax.nn.softplus(at_least_float32(raw)) + 1e-2

    return Layer(init, apply)


def cosine(d_model: int, d_projected: int, num_experts: int) -> Layer:
    """Logits by direction alone, ``l_e = exp(min(tau, log 100)) cos(W x + b, v_e)``.

    No token and no expert can dominate by its length; the learned scale starts at 2.

    Args:
        d_model: width of x, D.
        d_projected: width P of the space in which directions are compared.
        num_experts: E.

    Returns:
        A layer with params ``{"projection": {"kernel": [D, P], "bias": [P]}, "directions":
        [P, E], "log_scale": []}`` and ``apply(params, x [T, D]) -> logits [T, E]``.

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
    projection = linear(d_model, d_projected)
    directions_init = jax.nn.initializers.lecun_normal()

    def init(key: Array) -> Params:
        projection_key, directions_key = jax.random.split(key)
        return {
            "projection": projection.init(projection_key),
            "directions": directions_init(directions_key, (d_projected, num_experts), jnp.float32),
            "log_scale": jnp.asarray(math.log(2), jnp.float32),
        }

    def apply(params: Params, x: Array) -> Array:
        x = at_least_float32(x)
        projected = _unit(projection.apply(params["projection"], x), axis=-1, eps=1e-12)
        directions = _unit(params["directions"].astype(x.dtype), axis=0, eps=1e-12)
        scale = jnp.exp(jnp.minimum(params["log_scale"], math.log(100))).astype(x.dtype)
        return scale * (projected @ directions)  # [T, E]

    return Layer(init, apply)


def slots(d_model: int, num_experts: int, slots_per_expert: int) -> Layer:
    """The router of `soft_slots`, ``l_tec = scale cos(x_t, mu_ec)``.

    Args:
        d_model: width of x, D.
        num_experts: E.
        slots_per_expert: C; ``T / E`` makes as many slots as tokens.

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
            "slots": slots_init(key, (num_experts, slots_per_expert, d_model), jnp.float32),
            "scale": jnp.ones((), jnp.float32),
        }

    def apply(params: Params, x: Array) -> Array:
        x = _unit(at_least_float32(x), axis=-1, eps=1e-6)
        vectors = _unit(params["slots"].astype(x.dtype), axis=-1, eps=1e-6)
        return params["scale"].astype(x.dtype) * jnp.einsum("td,ecd->tec", x, vectors)

    return Layer(init, apply)


def _unit(x: Array, *, axis: int, eps: float) -> Array:
    # eps inside the root: the gradient at a zero vector stays finite.
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + eps)
