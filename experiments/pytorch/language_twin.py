"""The sparse language model in moejax, with the layout that leads from its twin in PyTorch."""

from __future__ import annotations

from typing import Any

import optax

from data.text import VOCABULARY
from language.contenders import Mixture, sparse
from language.transformer import Sizes
from moejax.interop.torch import Layout, Tensor, at, linear
from pytorch.twins import Twin, cross_entropy

SIZES = Sizes(VOCABULARY, width=64, layers=2, heads=4, context=64)
MIXTURE = Mixture(num_experts=8, k=2, hidden=64)


def language(sizes: Sizes = SIZES, mixture: Mixture = MIXTURE) -> Twin:
    """The cross-entropy alone, without a balance loss; Adam."""
    network = sparse(sizes, mixture, None)
    return Twin(
        network.init,
        lambda params, x: network.apply(params, x)[0],
        cross_entropy,
        optax.adam(1e-3),
        layout(sizes, mixture),
    )


def layout(sizes: Sizes, mixture: Mixture) -> Layout:
    """Where the parameters of the network lie in the module's ``state_dict``."""
    width = sizes.width
    return {
        "embedding": {"embedding": Tensor("embedding.weight", (sizes.vocabulary, width), (0, 1))},
        "blocks": {
            number: at(f"blocks.{number}", block(width, mixture)) for number in range(sizes.layers)
        },
        "norm": at("norm", norm(width)),
    }


def block(width: int, mixture: Mixture) -> Layout:
    """One block."""
    experts, _, hidden = mixture
    inward, outward = (experts, width, hidden), (experts, hidden, width)
    shapes = {"gate": inward, "up": inward, "down": outward}
    attention = {
        "inward": at("inward", linear(width, 3 * width, bias=False)),
        "outward": at("outward", linear(width, width, bias=False)),
    }
    feed_forward = {
        "router": at("router", linear(width, experts, bias=False)),
        "experts": {
            name: {"kernel": Tensor(name, shape, (0, 1, 2))} for name, shape in shapes.items()
        },
    }
    return {
        "attention": at("attention", attention),
        "feed_forward": at("mixture", feed_forward),
        "norms": {number: at(f"norms.{number}", norm(width)) for number in range(2)},
    }


def norm(width: int) -> Any:
    """A normalisation."""
    return {"scale": Tensor("weight", (width,), (0,))}
