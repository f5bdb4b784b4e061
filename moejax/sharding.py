"""Mixtures on a mesh of devices: data parallel along every axis, expert parallel along one.

Everything outside the schedule is ordinary JAX on global arrays. So a balance loss covers the whole
batch (loads and mean scores are summed over the mesh before they are multiplied), noise is the same
as on one device unless the rule is `tokenwise`, and a training step needs no change.

- `shardings` alone is the simple way: place the parameters, keep any schedule, and XLA's
  partitioner finds the communication. It serves `dense` and soft mixtures, where every expert sees
  every token, and a first try of any other on a mesh with Auto axes.
- `expert_parallel` and `tokenwise` fix the communication: one exchange of the rows that travel,
  in both directions. They serve sparse rules with many experts, and every mesh.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from moejax._calling import accepts, keeps_own
from moejax._comparing import comparable
from moejax.base import Array, Params, Rule
from moejax.schedules.expert_parallel import check_axis, check_tokens, expert_parallel, placed

__all__ = ["expert_parallel", "shardings", "token_sharding", "tokenwise"]


def shardings(tree: Params, mesh: Mesh, *, axis: str = "expert") -> Params:
    """Where every leaf lives: stacked experts along one mesh axis, all else on every device.

    A leaf belongs to the experts if ``"experts"`` is a key on its path, as in the params of `moe`
    and in an optimizer's state for them; its leading axis is E.

    Args:
        tree: params, an optimizer's state, a whole training state, or `jax.eval_shape` of one.
        mesh: the devices.
        axis: the mesh axis along which experts live.

    Returns:
        The tree of shardings, for `jax.device_put` or ``jax.jit(init, out_shardings=...)``.

    Raises:
        ValueError: if the mesh has no such axis, or an expert leaf's leading axis does not divide
            along it.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "expert"))
        >>> model = moejax.moe(moejax.linear(3, 2), moejax.linear(3, 8), num_experts=8)
        >>> params = model.init(jax.random.key(0))
        >>> params = jax.device_put(params, shardings(params, mesh))
        >>> params["experts"]["kernel"].sharding.spec, params["router"]["kernel"].sharding.spec
        (P('expert',), P())
    """
    check_axis(mesh, axis)
    num_shards = mesh.shape[axis]

    def sharding(path: tuple[Any, ...], leaf: Array) -> NamedSharding:
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        # `optax.adafactor` keeps one zero for what it does not factor.
        if "experts" not in names or leaf.shape in ((), (1,)):
            return NamedSharding(mesh, jax.P())
        if leaf.shape[0] % num_shards:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} must stack a multiple of {num_shards} experts to "
                f"be shared along {axis!r}, got shape {leaf.shape}."
            )
        return NamedSharding(mesh, jax.P(axis))

    return jax.tree.map_with_path(sharding, tree)


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lives: its leading axis spread over all devices of the mesh.

    Args:
        mesh: the devices.

    Returns:
        The sharding, for `jax.device_put` of inputs, targets and masks.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "expert"))
        >>> x = jax.device_put(jnp.ones((16, 3)), token_sharding(mesh))
        >>> x.sharding.shard_shape(x.shape)
        (2, 3)
    """
    return NamedSharding(mesh, jax.P(mesh.axis_names))


@comparable
def tokenwise(route: Rule, mesh: Mesh) -> Rule:
    """A rule that decides on each device for that device's own tokens.

    The decision is the same if the rule treats each token independently of the others. With the
    plain rule, XLA gathers all logits on every device for `jax.lax.top_k`. A rule that draws noise
    draws different noise on each device, and not what it would draw on a single one.

    Args:
        route: a rule, ``(logits [T, E], ...) -> decision`` with a leading axis T on every leaf.
            Whatever else the router returns has one entry per token, or one number per expert, [E].
            What has the shape [E] is of experts, even where T is E: return numbers of tokens as
            [T, 1].
        mesh: the devices; their number must divide T.

    Returns:
        A rule for `moe`'s ``route``, with the same arguments.

    Raises:
        ValueError: when the rule is traced, if the tokens do not divide among the devices.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "expert"))
        >>> route = tokenwise(partial(moejax.top_k, k=2), mesh)
        >>> logits = jax.device_put(jnp.zeros((16, 8)), token_sharding(mesh))
        >>> route(logits).experts.sharding.shard_shape((16, 2))
        (2, 2)
    """
    axes = mesh.axis_names

    @wraps(route)
    def on_mesh(*outputs: Array, key: Array | None = None, **extras: Any) -> Any:
        def on_device(outputs: Any, extras: Any, key: Array | None) -> Any:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axes))
            if accepts(route, "key") and not keeps_own(route, "key", key):
                extras = {"key": key, **extras}
            return route(*outputs, **extras)

        check_tokens(mesh, len(outputs[0]))
        # One number per expert, such as the bias of `biased`, is whole on every device.
        by_expert = outputs[0].shape[1:2]
        specs = tuple(jax.P() if one.shape == by_expert else jax.P(axes) for one in outputs)
        decide = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, jax.P(axes), jax.P()),
            out_specs=jax.P(axes),
        )
        split = tuple(placed(one, mesh, spec) for one, spec in zip(outputs, specs, strict=True))
        return decide(split, placed(extras, mesh, jax.P(axes)), key)

    return on_mesh
