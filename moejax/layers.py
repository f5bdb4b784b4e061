"""The layers that experts and routers are built from: linear, mlp, glu, and their wrappers.

Every built-in layer takes its matrix product as an argument, ``matmul``. One source then serves
``vmap`` (plain products, one per expert) and a grouped product over rows sorted by expert. Without
that argument it is the plain product, compiled with the operations around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from moejax._arrays import gradient_if, padded_by_example, where_kept
from moejax._calling import accepts, options_for
from moejax._checks import (
    check_array,
    check_count,
    check_gate,
    check_input,
    check_layer,
    check_mask,
    check_stacked,
    check_widths,
)
from moejax._comparing import comparable
from moejax._compiling import compiled
from moejax.base import Array, Layer, Matmul, Params

Initializer = Callable[..., Array]  # (key, shape, dtype) -> array, as in jax.nn.initializers
Activation = Callable[[Array], Array]
Combine = Callable[[Array, Array], Array]  # (gate [..., F], up [..., F]) -> [..., F]


@comparable
def fan_in_uniform(fan_in: int) -> Initializer:
    r"""How ``torch.nn.Linear`` starts its weight and bias: uniformly within a bound.

    .. math:: \pm 1 / \sqrt{\text{fan-in}}

    Args:
        fan_in: number of inputs of the layer.

    Returns:
        An initializer ``(key, shape, dtype) -> array``.

    Example:
        >>> kernel = fan_in_uniform(4)(jax.random.key(0), (4, 3))
        >>> bool(jnp.all(jnp.abs(kernel) <= 0.5))
        True
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@comparable
def linear(
    d_in: int,
    d_out: int,
    *,
    bias: bool = True,
    kernel_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    param_dtype: jnp.dtype = jnp.float32,
) -> Layer:
    """An affine map, :math:`y = x W + b`.

    It computes in the dtype of ``x``: parameters are cast to it, so float32 parameters serve
    bfloat16 activations.

    Args:
        d_in: input width D.
        d_out: output width O.
        bias: whether to add ``b``.
        kernel_init: initializer of ``W``; uniform within ``±1/sqrt(D)`` by default.
        bias_init: initializer of ``b``; uniform within ``±1/sqrt(D)`` by default.
        param_dtype: dtype in which ``W`` and ``b`` start. Layers made of linear ones take it with
            their ``layer``: ``mlp(2, 4, layer=partial(linear, param_dtype=jnp.bfloat16))``.

    Returns:
        A layer with params ``{"kernel": [D, O], "bias": [O]}``.

    Raises:
        ValueError: if a width is not a positive integer; in apply, if x is not floats of width D.

    Example:
        >>> layer = linear(3, 2)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    check_widths("linear", d_in, d_out)
    kernel_init = kernel_init or fan_in_uniform(d_in)
    bias_init = bias_init or fan_in_uniform(d_in)
    names = ("kernel", "bias") if bias else ("kernel",)

    def init(key: Array) -> Params:
        kernel_key, bias_key = jax.random.split(key)
        params = {"kernel": kernel_init(kernel_key, (d_in, d_out), param_dtype)}
        if bias:
            params["bias"] = bias_init(bias_key, (d_out,), param_dtype)
        return params

    def apply(params: Params, x: Array, *, matmul: Matmul | None = None) -> Array:
        check_input(x, params["kernel"])
        own = {name: params[name] for name in names}
        return _affine(own, x) if matmul is None else _affine_by(matmul, own, x)

    return Layer(init, apply)


def _affine_by(matmul: Matmul, params: Params, x: Array) -> Array:
    y = matmul(x, params["kernel"].astype(x.dtype))
    if "bias" in params:
        # The bias is the kernel of one constant input, so a grouped product finds its rows too.
        one = jnp.ones_like(x[..., :1])  # [..., 1], on the devices where x is
        y += matmul(one, params["bias"].astype(x.dtype)[..., None, :])
    return y


@compiled()
def _affine(params: Params, x: Array) -> Array:
    return _affine_by(jnp.matmul, params, x)


@comparable
def mlp(
    *widths: int, activation: Activation = jax.nn.relu, layer: Callable[..., Layer] = linear
) -> Layer:
    r"""A multi-layer perceptron, affine maps with an activation a between them.

    .. math:: h_0 = x, \qquad h_i = a(h_{i-1} W_i + b_i), \qquad y = h_{n-1} W_n + b_n

    Args:
        *widths: D, the hidden widths, O.
        activation: applied between layers, not after the last.
        layer: makes each layer from its two widths: `linear` with other options, such as
            ``partial(linear, bias=False)`` or another initializer, or a layer of your own.

    Returns:
        A layer with params ``{"layers": [{"kernel", "bias"}, ...]}``.

    Raises:
        ValueError: with fewer than two widths, or one that is not a positive integer.

    Example:
        >>> gate = mlp(2, 4, 2)
        >>> params = gate.init(jax.random.key(0))
        >>> [p["kernel"].shape for p in params["layers"]]
        [(2, 4), (4, 2)]
    """
    if len(widths) < 2:
        raise ValueError(
            f"`mlp` needs at least an input and an output width, got {widths}: "
            "write mlp(784, 50, 10)."
        )
    check_widths("mlp", *widths)
    layers = [layer(d_in, d_out) for d_in, d_out in pairwise(widths)]

    def init(key: Array) -> Params:
        keys = jax.random.split(key, len(layers))
        return {"layers": [one.init(k) for one, k in zip(layers, keys, strict=True)]}

    def apply(params: Params, x: Array, *, matmul: Matmul | None = None) -> Array:
        *hidden, last = zip(layers, params["layers"], strict=True)
        for one, p in hidden:
            x = activation(_apply(one, p, x, matmul))
        one, p = last
        return _apply(one, p, x, matmul)

    return Layer(init, _with_matmul_of(layers, apply))


_unbiased = partial(linear, bias=False)


@comparable
def glu(
    d_model: int,
    d_hidden: int,
    *,
    activation: Activation = jax.nn.silu,
    combine: Combine | None = None,
    layer: Callable[..., Layer] = _unbiased,
) -> Layer:
    r"""A gated linear unit; SwiGLU with the default activation a.

    .. math:: y = (a(x W_{gate}) \odot x W_{up})\, W_{down}

    With ``combine``, any :math:`y = c(x W_{gate}, x W_{up})\, W_{down}`: GPT-OSS clamps both and
    adds 1 to the second.

    Args:
        d_model: input and output width D.
        d_hidden: hidden width F.
        activation: applied to the gate.
        combine: ``(gate, up) -> hidden``, all of shape [..., F]; None for
            ``activation(gate) * up``.
        layer: makes each of the three layers from its two widths; `linear` without bias by default.

    Returns:
        A layer with params ``{"gate": ..., "up": ..., "down": ...}``, each the params of one layer:
        by default ``{"kernel": [D, F]}`` twice, and ``{"kernel": [F, D]}``.

    Raises:
        ValueError: if a width is not a positive integer.

    Example:
        >>> layer = glu(4, 8)
        >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((3, 4))).shape
        (3, 4)
        >>> def clamped(gate, up):
        ...     return jax.nn.silu(jnp.minimum(gate, 7)) * jnp.clip(up, -7, 7)
        >>> layer = glu(4, 8, combine=clamped)

    References:
        Shazeer, `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_, 2020
    """
    check_widths("glu", d_model, d_hidden)
    up, down = layer(d_model, d_hidden), layer(d_hidden, d_model)
    combine = combine or (lambda gate, up: activation(gate) * up)

    def init(key: Array) -> Params:
        gate_key, up_key, down_key = jax.random.split(key, 3)
        return {"gate": up.init(gate_key), "up": up.init(up_key), "down": down.init(down_key)}

    def apply(params: Params, x: Array, *, matmul: Matmul | None = None) -> Array:
        both = (_apply(up, params[name], x, matmul) for name in ("gate", "up"))
        return _apply(down, params["down"], combine(*both), matmul)

    return Layer(init, _with_matmul_of([up, down], apply))


@comparable
def gated(layer: Layer, gate: Layer) -> Layer:
    r"""A layer L behind a gate G of its own.

    .. math:: y = \sigma(G(x)) \odot L(x)

    It lets a token switch off the shared expert of `with_shared`.

    Args:
        layer: L, any ``x -> [T, O]``.
        gate: G, ``x -> [T, 1]`` for one gate per token, or [T, O] for one per output.

    Returns:
        A layer with params ``{"layer": ..., "gate": ...}``.

    Raises:
        ValueError: if one of them is not a layer; in apply, if one returns more than its output, or
            if the gate's output would change the shape of the layer's.

    Example:
        >>> shared = gated(glu(4, 8), linear(4, 1, bias=False))
        >>> shared.apply(shared.init(jax.random.key(0)), jnp.ones((3, 4))).shape
        (3, 4)

    References:
        Qwen Team, `Qwen1.5-MoE <https://qwenlm.github.io/blog/qwen-moe/>`_, 2024
    """
    check_layer("layer", layer)
    check_layer("gate", gate)

    def init(key: Array) -> Params:
        layer_key, gate_key = jax.random.split(key)
        return {"layer": layer.init(layer_key), "gate": gate.init(gate_key)}

    def apply(params: Params, x: Array, *, matmul: Matmul | None = None) -> Array:
        y = _apply(layer, params["layer"], x, matmul)
        logits = _apply(gate, params["gate"], x, matmul)
        check_array(y)
        check_array(logits)
        check_gate(logits, y)
        return jax.nn.sigmoid(logits) * y

    return Layer(init, _with_matmul_of([layer, gate], apply))


@comparable
def between(before: Layer, model: Layer, after: Layer) -> Layer:
    """A layer in another space, :math:`y = A(M(B(x)))`: experts in a narrower one, for example.

    Args:
        before: B, ``x [T, D] -> [T, D']``.
        model: M, a mixture or any layer of width D'. What it returns besides its output, such as
            the decision of `moe`, is returned, too; ``key`` and ``mask`` are passed to it if it
            takes them. Masked tokens are not read, and their outputs are zero.
        after: A, from the width of M's output to that of y.

    Returns:
        A layer with params ``{"before": ..., "model": ..., "after": ...}``, which takes ``key`` and
        ``mask`` and returns what ``model`` does.

    Example:
        >>> mixture = moejax.moe(glu(2, 4), linear(2, 3), num_experts=3)
        >>> model = between(linear(8, 2), mixture, linear(2, 8))
        >>> y, routing = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 8)))
        >>> y.shape, routing.weights.shape
        ((5, 8), (5, 3))

    References:
        NVIDIA, `Nemotron 3 <https://arxiv.org/abs/2512.20856>`_, 2025 (latent experts)
    """
    layers = {"before": before, "model": model, "after": after}
    for name, one in layers.items():
        check_layer(name, one)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        return {name: one.init(k) for (name, one), k in zip(layers.items(), keys, strict=True)}

    def apply(
        params: Params, x: Array, *, key: Array | None = None, mask: Array | None = None
    ) -> Any:
        if mask is not None:
            x, mask = jnp.asarray(x), jnp.asarray(mask)
            check_mask(mask, x.shape[: mask.ndim])
            params = gradient_if(mask.any(), params)
        options = options_for(model.apply, key=key, mask=mask)
        x = before.apply(params["before"], _padded(x, mask))
        output = model.apply(params["model"], x, **options)
        y, *evidence = output if isinstance(output, tuple) else (output,)
        y = after.apply(params["after"], _padded(y, mask))
        y = y if mask is None else where_kept(mask, y)
        return (y, *evidence) if isinstance(output, tuple) else y

    return Layer(init, apply)


def _padded(x: Array, mask: Array | None) -> Array:
    """The tokens [..., ...], masked ones [...] replaced: a layer may be undefined at zero."""
    if mask is None:
        return x
    tokens = x.reshape(-1, *x.shape[mask.ndim :])
    return padded_by_example(tokens, mask.reshape(-1)).reshape(x.shape)


def _with_matmul_of(layers: list[Layer], apply: Callable[..., Array]) -> Callable[..., Array]:
    """``apply``, with an argument ``matmul`` only if all layers that it is made of have one.

    Where an expert names it, a grouped product may run it on the parameters of all experts.
    """
    if all(accepts(one.apply, "matmul") for one in layers):
        return apply
    return lambda params, x: apply(params, x)


def _apply(layer: Layer, params: Params, x: Array, matmul: Matmul | None) -> Array:
    if accepts(layer.apply, "matmul"):
        return layer.apply(params, x, matmul=matmul)
    return layer.apply(params, x)


@comparable
def stack(layer: Layer, num_experts: int) -> Layer:
    r"""E copies of a layer, each with its own parameters: :math:`y_e = f(\theta_e, x)`.

    Args:
        layer: the expert.
        num_experts: E, how many there are.

    Returns:
        A layer whose params have a leading axis E on every leaf, and whose apply gives
        ``[E, T, O]`` for ``x [T, D]``.

    Raises:
        ValueError: if the layer is none, or ``num_experts`` is not a positive integer; in apply,
            if the params are of another number of experts.

    Example:
        >>> experts = stack(linear(3, 2), 4)
        >>> params = experts.init(jax.random.key(0))
        >>> params["kernel"].shape, experts.apply(params, jnp.ones((5, 3))).shape
        ((4, 3, 2), (4, 5, 2))
    """
    check_layer("layer", layer)
    check_count("num_experts", num_experts)

    def init(key: Array) -> Params:
        return jax.vmap(layer.init)(jax.random.split(key, num_experts))

    def apply(params: Params, x: Array) -> Array:
        check_stacked(params, num_experts)
        return jax.vmap(layer.apply, in_axes=(0, None), axis_size=num_experts)(params, x)

    return Layer(init, apply)
