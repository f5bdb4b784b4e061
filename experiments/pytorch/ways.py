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


def ways(model: str) -> dict[str, Way]:
    """The ways to train this model, by what they are called."""
    if model == "toy":
        found = {"PyTorch, loop": Way("toy", "repeated")}
    elif model == "language":
        found = {  # torch.compile takes no grouped product in float32
            "PyTorch, grouped_mm": Way("language_grouped", "indexed"),
            "PyTorch, loop over experts": Way("language", "indexed"),
        }
    else:
        found = {
            "PyTorch, DataLoader": Way(model, "loaded"),
            "PyTorch, indexing": Way(model, "indexed"),
        }
    if not compiler():
        return found
    last = list(found.values())[-1]
    return found | {COMPILED: last._replace(compiled=True)}


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, if there is one."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)
