"""Routers beyond a plain layer: what they return goes to the rule."""

from __future__ import annotations

import jax

from moejax.types import Array, Layer, Params, at_least_float32


def noisy(router: Layer, noise_router: Layer) -> Layer:
    """A router that also learns how much noise its logits get.

    ``logits = router(x)`` and ``noise_scale = softplus(noise_router(x)) + 1e-2``: the two
    arguments of `noisy_top_k`.

    Args:
        router: ``x [T, D] -> logits [T, E]``.
        noise_router: ``x [T, D] -> [T, E]``, before the softplus.

    Returns:
        A layer with params ``{"router", "noise"}`` whose apply gives ``(logits, noise_scale)``.

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

    def apply(params: Params, x: Array) -> tuple[Array, Array]:
        raw = at_least_float32(noise_router.apply(params["noise"], x))
        return router.apply(params["router"], x), jax.nn.softplus(raw) + 1e-2

    return Layer(init, apply)
