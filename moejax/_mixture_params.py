"""Where in the params of a mixture, or in an optimizer's moments, experts and logits are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.base import Params

Shape = tuple[int, ...]
PLACEHOLDER: Shape = (1,)  # of what `optax.adafactor` keeps in place of a moment


def is_mixture(node: Any) -> bool:
    """Whether a node of a pytree has the structure of a mixture's params."""
    return isinstance(node, Mapping) and set(node) == {"router", "experts"}


def as_dicts(node: Any) -> Any:
    """Mappings of other types as dicts, of which those types can be made again."""
    if not isinstance(node, Mapping):
        return node
    return {name: as_dicts(value) for name, value in node.items()}


def num_experts_of(params: Params) -> int | None:
    """E, the number of experts and of logits; None if an optimizer keeps no leaf of that size."""
    leaves = map(jnp.shape, jax.tree.leaves(params["experts"]))
    experts = [shape for shape in leaves if shape != PLACEHOLDER]
    kept = [(shape, axes) for shape, axes in _logits(params["router"]) if shape != PLACEHOLDER]
    logits = [shape for shape, _ in kept]
    sizes = {shape[:1] for shape in experts} | {shape[-1:] for shape in logits}
    if any(len(shape) < axes for shape, axes in kept):
        raise ValueError(
            f"The router's kernel must be [D, E], got {_listed(logits)}: a factored moment cannot "
            "follow its parameter, so make the optimizer's state anew."
        )
    # Stacked layers may be as many as the experts; if not, the sizes tell.
    stacked = [len(shape) > axes and shape[0] == shape[-1] for shape, axes in kept]
    if len(sizes) > 1 or () in sizes or (stacked and all(stacked)):
        raise ValueError(
            "The params must be those of one `moe`, experts [E, ...] and logits [..., E], got "
            f"experts {_listed(experts)} and a router {_listed(logits)}: map over stacked layers "
            "with `jax.vmap`, and change the banks of `moe_of` by hand."
        )
    return sizes.pop()[0] if sizes else None


def _logits(router: Params) -> list[tuple[Shape, int]]:
    """The shapes of the leaves with logits, and how many axes each has in a single layer."""
    router = as_dicts(router)
    try:
        axes = jax.tree.leaves(logit_axes(router))
    except ValueError:  # of another structure, which `merge` does not read
        return []
    shapes = map(jnp.shape, jax.tree.leaves(router))
    return [(shape, number) for shape, number in zip(shapes, axes, strict=True) if number]


def _listed(shapes: list[Shape]) -> str:
    return " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes)) or "without leaves"


def logit_axes(router: Params) -> Params:
    """For each leaf of a router the number of its axes if the last is of logits, or 0."""
    if not (isinstance(router, dict) and jax.tree.leaves(router)):
        return jax.tree.map(lambda _: 1, router)  # the bias of `biased`
    if "router" in router:  # `noisy`, or a router beside its bias
        return {name: logit_axes(node) for name, node in router.items()}
    none = jax.tree.map(lambda _: 0, router)
    return with_last_of_router(none, _linear_axes)


def _linear_axes(layer: Params) -> Params:
    axes = {name: 2 if name == "kernel" else 1 for name in layer}
    return {name: jax.tree.map(lambda _, n=axes[name]: n, leaf) for name, leaf in layer.items()}


def with_last(params: Params, change: Callable[[Params], Params], *, what: str) -> Params:
    """Params of `linear`, `mlp` or `glu`, with the last linear layer changed."""
    if isinstance(params, dict):
        if "kernel" in params:
            return change(params)
        if "layers" in params:
            changed = partial(with_last, change=change, what=what)
            return {**params, "layers": _with_last_of(params["layers"], changed)}
        if "down" in params:
            return {**params, "down": with_last(params["down"], change, what=what)}
    raise ValueError(
        f"The {what} must end in a `linear`, as `linear`, `mlp` and `glu` do: change params of "
        "another structure by hand."
    )


def with_last_of_router(router: Params, change: Callable[[Params], Params]) -> Params:
    """Params of a router, or of what wraps one, with its last linear layer changed."""
    if isinstance(router, dict) and "router" in router:  # `noisy` and `biased`
        return {**router, "router": with_last_of_router(router["router"], change)}
    return with_last(router, change, what="router")


def _with_last_of(layers: Any, change: Callable[[Params], Params]) -> Any:
    """The layers with the last one changed; Flax keeps them in a dict, by number."""
    if isinstance(layers, dict):
        last = max(layers, key=lambda name: (len(str(name)), str(name)))  # "10" comes after "9"
        return {**layers, last: change(layers[last])}
    *first, last = layers
    changed = [*first, change(last)]
    return tuple(changed) if isinstance(layers, tuple) else changed
