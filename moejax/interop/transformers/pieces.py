"""The pieces of the families: layers with their two layouts, and functions that combine them.

Every function here pairs one of moejax's public functions with the layout of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from moejax.base import Layer
from moejax.interop.torch import Layout, Tensor, at, parts, stacked
from moejax.interop.torch import linear as linear_layout
from moejax.interop.torch import stack as spread
from moejax.interop.transformers.fields import Config, count, refuse
from moejax.layers import gated, glu, linear
from moejax.moe_layer import moe, with_shared
from moejax.routers import biased


class Block(NamedTuple):
    """A layer and where its weights lie.

    Attributes:
        layer: the layer.
        layout: with the names of tensors in the module of the installed transformers.
        published: with their names in checkpoints, most of which have one tensor per expert.
    """

    layer: Layer
    layout: Layout
    published: Layout


Names = tuple[str, str, str]  # gate, up, down
QWEN: Names = ("gate_proj", "up_proj", "down_proj")
MIXTRAL: Names = ("w1", "w3", "w2")


def router(
    d_model: int,
    num_experts: int,
    name: str = "gate",
    *,
    published: str | None = None,
    bias: bool = False,
) -> Block:
    """A linear router."""
    layout = linear_layout(d_model, num_experts, bias=bias)
    layer = linear(d_model, num_experts, bias=bias)
    return Block(layer, at(name, layout), at(published or name, layout))


def choosing(
    logits: Block,
    num_experts: int,
    key: str,
    *,
    published: str | None = None,
    stored: tuple[int, ...] | None = None,
) -> Block:
    """`biased`: a router beside a bias that chooses and has no weight; the rule takes both."""
    bias = [Tensor(name, (num_experts,), (0,), stored=stored) for name in (key, published or key)]
    return Block(
        biased(logits.layer, num_experts),
        {"router": logits.layout, "balance_bias": bias[0]},
        {"router": logits.published, "balance_bias": bias[1]},
    )


def dense_glu(
    d_model: int,
    d_hidden: int,
    name: str,
    *,
    names: Names = QWEN,
    published: str | None = None,
    published_names: Names | None = None,
    bias: bool = False,
    **options: Any,
) -> Block:
    """A gated layer as three linear modules; ``options`` go to `glu`."""
    layer = glu(d_model, d_hidden, layer=partial(linear, bias=bias), **options)

    def layout(name: str, names: Names) -> Layout:
        return at(name, _three(d_model, d_hidden, names, bias))

    return Block(layer, layout(name, names), layout(published or name, published_names or names))


def glu_experts(
    d_model: int,
    d_hidden: int,
    num_experts: int,
    *,
    names: Names | None = QWEN,
    transposed: bool = False,
    **options: Any,
) -> Block:
    """Gated experts in two tensors, ``gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``.

    Args:
        d_model: input and output width D.
        d_hidden: hidden width F.
        num_experts: E.
        names: of the three tensors of each expert in checkpoints; None if checkpoints, too, have
            two tensors for all experts.
        transposed: whether the two are [E, D, 2F] and [E, F, D].
        **options: for `glu`.
    """
    gate_up = ("gate_up_proj", (2 * d_hidden, d_model), (1, 0))
    down = Tensor("down_proj", (d_model, d_hidden), (1, 0))
    if transposed:
        gate_up = ("gate_up_proj", (d_model, 2 * d_hidden), (0, 1))
        down = Tensor("down_proj", (d_hidden, d_model), (0, 1))
    gate, up = parts(Tensor(*gate_up), 2, axis=int(transposed))
    one = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down}}
    fused = at("experts", stacked(one, num_experts))
    published = fused
    if names is not None:
        published = at("experts", spread(_three(d_model, d_hidden, names, False), num_experts))
    return Block(glu(d_model, d_hidden, **options), fused, published)


def mixture(
    gate: Block, experts: Block, num_experts: int, route: Callable[..., Any], **options: Any
) -> Block:
    """`moe` of a router and experts; ``options`` go to `moe`."""
    layer = moe(experts.layer, gate.layer, num_experts=num_experts, route=route, **options)
    return Block(
        layer,
        {"router": gate.layout, "experts": experts.layout},
        {"router": gate.published, "experts": experts.published},
    )


def beside(model: Block, shared: Block) -> Block:
    """`with_shared`: an expert that always runs."""
    return Block(
        with_shared(model.layer, shared.layer),
        {"routed": model.layout, "shared": shared.layout},
        {"routed": model.published, "shared": shared.published},
    )


def behind(block: Block, gate: Block) -> Block:
    """`gated`: a layer times the sigmoid of a gate."""
    return Block(
        gated(block.layer, gate.layer),
        {"layer": block.layout, "gate": gate.layout},
        {"layer": block.published, "gate": gate.published},
    )


def chosen(config: Config, num_experts: int, *names: str, renormalize: bool = True) -> int:
    """K, experts per token; refused where the family cannot have it."""
    names = names or ("num_experts_per_tok",)
    k = count(config, *names)
    if k > num_experts:
        refuse(config, names[0], f"be at most the number of experts, {num_experts}", k)
    if k == 1 and renormalize:
        refuse(config, names[0], "be at least 2 where weights are divided by their sum", k)
    return k


def _three(d_model: int, d_hidden: int, names: Names, bias: bool) -> Layout:
    gate, up, down = names
    return {
        "gate": at(gate, linear_layout(d_model, d_hidden, bias=bias)),
        "up": at(up, linear_layout(d_model, d_hidden, bias=bias)),
        "down": at(down, linear_layout(d_hidden, d_model, bias=bias)),
    }
