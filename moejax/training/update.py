"""An optimizer's update, with what it asks for."""

from __future__ import annotations

import inspect
from typing import Any

import optax

from moejax.base import Params


def updated(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    state: optax.OptState,
    params: Params | None,
    **extra: Any,
) -> tuple[Params, optax.OptState]:
    """Updates and the next state, from gradients and the extra arguments that it takes.

    `optax.with_extra_args_support` goes by the optimizer's type, and so keeps them from
    `optax.MultiSteps`, which passes them on.
    """
    taken = inspect.signature(optimizer.update).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        extra = {name: value for name, value in extra.items() if name in taken}
    return optimizer.update(gradients, state, params, **extra)
