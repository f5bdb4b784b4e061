"""The ways in which a PyTorch user trains each model: what moejax has to be faster than."""

from __future__ import annotations

import os
import shutil
from typing import NamedTuple

BATCH_SIZE = {"dense": 128, "soft": 128, "sparse": 128, "language": 16}
IMAGES = {"dense", "soft", "sparse"}  # the models that take them
COMPILED, MOEJAX = "PyTorch, torch.compile", "moejax"


class Way(NamedTuple):
    """How to train.

    Attributes:
        study: the module, a name in `recipes.STUDIES`.
        batches: how to go through the data, a name in `batches.BATCHES`.
        compiled: whether torch.compile compiles the module.
    """

    study: str
    batches: str
    compiled: bool = False


# By model, then by the name of a way. torch.compile takes the last of them; in float32 it cannot
# take a grouped product.
EAGER = {
    name: {"PyTorch, DataLoader": Way(name, "loaded"), "PyTorch, indexing": Way(name, "indexed")}
    for name in IMAGES
} | {
    "toy": {"PyTorch, loop": Way("toy", "repeated")},
    "language": {
        "PyTorch, grouped_mm": Way("language_grouped", "indexed"),
        "PyTorch, loop over experts": Way("language", "indexed"),
    },
}


def ways(model: str) -> dict[str, Way]:
    """The ways to train this model, by what they are called."""
    eager = EAGER[model]
    if not compiler():
        return eager
    *_, last = eager.values()
    return eager | {COMPILED: last._replace(compiled=True)}


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, if there is one."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)
