"""Parameters of one mixture made from another model's: pure functions on pytrees.

All of them take and return the params of `moe`, ``{"router": ..., "experts": ...}``, or any pytree
of that structure. `take_experts` and `prune` also work on an optimizer's moments, and so does
`grow`, if it grows to a multiple without offset and noise; see `map_mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax._arrays import at_least_float32
from moejax._checks import check_count
from moejax._mixture_params import (
    PLACEHOLDER,
    as_dicts,
    is_mixture,
    logit_axes,
    num_experts_of,
    with_last,
    with_last_of_router,
)
from moejax.base import Array, Params


def upcycle(
    dense: Params,
    router: Params,
    *,
    num_experts: int,
    total: float = 1.0,
    noise: float = 0.0,
    key: Array | None = None,
) -> Params:
    """A mixture of E copies of one layer, which computes what the layer does.

    Every expert starts as the dense layer, and the router's last layer starts at zero, so that all
    experts are equally likely. Weights that sum to one then give the layer's own output, for every
    K. Raw weights of a softmax sum to K/E instead: ``total=K / E`` divides the last layer of each
    expert by that sum, and the mixture's output is the layer's again.

    Args:
        dense: params of the layer; its last linear layer is found by name.
        router: params of the router, which must end in a linear layer.
        num_experts: E, how many there are.
        total: the sum of a token's weights at the start: 1 if they are renormalised, K/E for the
            raw probabilities of `top_k`, 1/E for `switch`, K/2 for raw sigmoids.
        noise: standard deviation of what is added to every copy but the first, relative to the
            standard deviation of each leaf; copies that are equal and chosen alike stay equal.
        key: a PRNG key, for noise.

    Returns:
        Params for ``moe(layer, router, num_experts=E, ...)``.

    Raises:
        ValueError: if a number is out of range, if there is noise and no key, if no last layer is
            found in the router, or in the layer when ``total`` is not 1, or if the router has
            another number of logits.

    Example:
        >>> layer, router = moejax.mlp(2, 4, 3), moejax.linear(2, 8)
        >>> dense = layer.init(jax.random.key(0))
        >>> params = upcycle(dense, router.init(jax.random.key(1)), num_experts=8)
        >>> model = moejax.moe(layer, router, num_experts=8, route=partial(moejax.top_k, k=2))
        >>> x = jnp.ones((5, 2))
        >>> bool(jnp.allclose(model.apply(params, x)[0], layer.apply(dense, x), rtol=1e-5))
        True

    References:
        Komatsuzaki et al., `Sparse Upcycling <https://arxiv.org/abs/2212.05055>`_, 2023
    """
    check_count("num_experts", num_experts)
    if not total > 0:
        raise ValueError(f"`total` must be positive, the sum of a token's weights, got {total}.")
    _check_noise(noise, key)
    one = dense if total == 1 else _divided(dense, total)
    experts = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_experts, *jnp.shape(leaf))), one
    )
    if noise and key is not None:
        experts = _perturbed(experts, noise, key)
    # Only the last layer: with zeros throughout, no gradient would reach an `mlp`.
    zeros = partial(jax.tree.map, jnp.zeros_like)
    params = {"router": with_last_of_router(router, zeros), "experts": experts}
    num_experts_of(params)  # refuses a router with another number of logits
    return params


def grow(
    params: Params,
    *,
    num_experts: int,
    offset: float | None = None,
    noise: float = 0.0,
    key: Array | None = None,
) -> Params:
    """The same mixture with more experts: copies of the old ones, in turn.

    A copy gets its original's column of the router. The mixture computes the same function:

    - under `softmax`, where all experts are in the sum; if some have more copies than others, the
      router's bias is lowered by the logarithm of their number, which is right unless the logits
      are `tempered` or `soft_capped`;
    - under top-k, if K grows with E: ``k=2`` of 4 becomes ``k=4`` of 8;
    - under every rule that ranks logits, with the same K and a large ``offset``: the copies rank so
      low that no token chooses them yet. Lower the offset to bring them in. Where a router is
      `biased`, the offset lowers that bias instead of the logits; an offset above 1 plus the spread
      of the biases is large, and `update_balance_bias` brings the copies in step by step.

    Lowering a bias and adding noise are for parameters only: in an optimizer's moments they would
    make a mean of squares negative and the updates NaN. For the moments, use `take_experts` with
    ``ids=np.arange(num_experts) % E``.

    Args:
        params: of a mixture whose router ends in a linear layer.
        num_experts: the new E, at least the old one.
        offset: how much lower the copies' logits, or biases, are than their originals'; None for
            the first two cases.
        noise: as in `upcycle`, added to the copies and not to the originals.
        key: a PRNG key, for noise.

    Returns:
        Params of the larger mixture; the old experts come first.

    Raises:
        ValueError: if there would be fewer experts, if there is noise and no key, if the router has
            no bias where one is needed, or if the params are not those of one `moe`.

    Example:
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 4), num_experts=4)
        >>> larger = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 6), num_experts=6)
        >>> params, x = model.init(jax.random.key(0)), jnp.ones((5, 2))
        >>> grown = grow(params, num_experts=6)
        >>> same = jnp.allclose(larger.apply(grown, x)[0], model.apply(params, x)[0], rtol=1e-5)
        >>> bool(same)
        True
    """
    check_count("num_experts", num_experts)
    old = num_experts_of(params)
    if old is None:  # moments of which an optimizer keeps nothing
        return params
    if num_experts < old:
        raise ValueError(f"`num_experts` must be at least {old}, got {num_experts}: use `prune`.")
    _check_noise(noise, key)
    origin = np.arange(num_experts) % old
    grown = take_experts(params, origin)
    if offset is None:
        # Each by the logarithm of how many copies there are of its expert.
        grown["router"] = _lower_logits(grown["router"], np.log(np.bincount(origin)[origin]))
    else:
        by = np.where(np.arange(num_experts) < old, 0, offset)
        grown["router"] = _ranked_lower(grown["router"], by)
    if noise and key is not None:
        noisy = _perturbed(grown["experts"], noise, key)
        keep_old = lambda new, leaf: jnp.concatenate([leaf[:old], new[old:]])  # noqa: E731
        grown["experts"] = jax.tree.map(keep_old, noisy, grown["experts"])
    return grown


def prune(params: Params, keep: Any) -> Params:
    """The mixture without some of its experts.

    Dropping an expert that no token chooses changes nothing where the weights depend on the chosen
    experts alone: `top_k` renormalised, or any sigmoid. `expert_load` measures which experts are
    chosen, and ``jnp.argsort(-load)[:n]`` are the n with the largest load.

    Args:
        params: of a mixture whose router ends in a linear layer.
        keep: ids of the experts that stay, in their new order, distinct.

    Returns:
        Params of the smaller mixture.

    Raises:
        ValueError: if ids are repeated, out of range, not integers, or none, or if the params are
            not those of one `moe`.

    Example:
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 4), num_experts=4)
        >>> smaller = prune(model.init(jax.random.key(0)), [2, 0])
        >>> smaller["router"]["kernel"].shape, smaller["experts"]["kernel"].shape
        ((2, 2), (2, 2, 1))

    References:
        Lu et al., `Not All Experts are Equal <https://arxiv.org/abs/2402.14800>`_, 2024
    """
    ids, old = np.asarray(keep), num_experts_of(params)
    if not _are_ids(ids, old) or len(np.unique(ids)) < ids.size:
        raise ValueError(f"`keep` must be distinct ids of {_some(old)}, got {ids.tolist()}.")
    return take_experts(params, ids)


def merge(params: Params, load: Array) -> Params:
    """One layer from all experts of a mixture: their mean, weighted by load.

    The result is exact where experts are equal, or linear layers with constant gates; otherwise it
    is a starting point for training a dense layer.

    Args:
        params: of a mixture.
        load: share or count of the choices of each expert, such as from `expert_load`, shape [E].

    Returns:
        Params of one expert.

    Raises:
        ValueError: if the load is not one number per expert, or its sum is not positive, or if the
            params are not those of one `moe` or hold integers.

    Example:
        >>> experts = {"kernel": jnp.stack([jnp.zeros((2, 1)), jnp.ones((2, 1))])}
        >>> merge({"router": {}, "experts": experts}, jnp.array([1, 3]))["kernel"].ravel()
        Array([0.75, 0.75], dtype=float32)

    References:
        Li et al., `Merge, Then Compress <https://arxiv.org/abs/2310.01334>`_, 2024
    """
    load, num_experts = jnp.asarray(load), num_experts_of(params) or 1
    if load.shape != (num_experts,):
        raise ValueError(
            f"`load` must hold one number per expert, [{num_experts}], got {list(load.shape)}."
        )
    # With NumPy, because known loads may be used in a function that is traced.
    if not isinstance(load, jax.core.Tracer) and not np.asarray(load).sum() > 0:
        raise ValueError("`load` must be positive for one expert at least, got a sum of 0.")

    def mean(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        if not _is_inexact(leaf):
            raise ValueError(
                f"Only experts of numbers have a mean, got a leaf of {leaf.dtype}: take it out of "
                "the params, and put one expert's in afterwards."
            )
        wide = at_least_float32(leaf)
        weights = load.astype(wide.dtype)
        merged = jnp.tensordot(weights / weights.sum(), wide, axes=1, precision="highest")
        return merged.astype(leaf.dtype)

    return jax.tree.map(mean, params["experts"])


def take_experts(params: Params, ids: Any) -> Params:
    """Some experts of a mixture, in any order and any number of times, with their logits.

    `prune` takes distinct ones, `grow` takes all of them in turn. Whichever function made the
    parameters, an optimizer's moments follow by taking the same experts: nothing is added to them.

    Args:
        params: of a mixture whose router ends in a linear layer, or a pytree like them.
        ids: of the experts, a list of integers in [0, E).

    Returns:
        Params of as many experts as there are ids.

    Raises:
        ValueError: if ids are out of range, not integers, or none, or if the params are not those
            of one `moe`: map over stacked layers with `jax.vmap`.

    Example:
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 4), num_experts=4)
        >>> params = take_experts(model.init(jax.random.key(0)), [0, 1, 2, 3, 0, 1])
        >>> params["router"]["kernel"].shape
        (2, 6)
    """
    ids, num_experts = np.asarray(ids), num_experts_of(params)
    if not _are_ids(ids, num_experts):  # a gather would read the last one
        raise ValueError(
            f"`ids` must be a list of ids of {_some(num_experts)}, integers in "
            f"[0, {num_experts or 'E'}), got {ids.tolist()}."
        )

    def taken(leaf: Array, *, axis: int) -> Array:
        if jnp.shape(leaf) == PLACEHOLDER and num_experts != 1:
            return leaf
        leaf = jnp.asarray(leaf)
        return leaf[ids] if axis == 0 else leaf[..., ids]

    router = as_dicts(params["router"])
    columns = jax.tree.map(
        lambda leaf, axes: taken(leaf, axis=-1) if axes else leaf, router, logit_axes(router)
    )
    return {"router": columns, "experts": jax.tree.map(partial(taken, axis=0), params["experts"])}


def map_mixtures(operate: Callable[[Params], Params], tree: Any) -> Any:
    """Applies a function to every subtree that has the structure of a mixture's params.

    An optimizer's moments have that structure, so they change with their parameters; everything
    else is unchanged, and so is what an optimizer keeps in place of a moment: nothing, or one zero
    as `optax.adafactor` does. Moments that it factored may have lost the axis of experts: if a
    router's kernel is factored, or the axis is gone, they are refused.

    Args:
        operate: a function of params, such as ``partial(take_experts, ids=[0, 2])``; for moments,
            one that only takes experts, as `grow` does if it grows to a multiple without offset
            and noise.
        tree: any pytree, such as the params of a whole model or an optimizer's state; its mappings
            may be of Flax's types, ``FrozenDict`` and ``nnx.State``, and keep them.

    Returns:
        The tree with changed mixtures.

    Raises:
        ValueError: whatever the function refuses.

    Example:
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 4), num_experts=4)
        >>> params = model.init(jax.random.key(0))
        >>> state = {"count": 3, "mean": jax.tree.map(jnp.zeros_like, params)}
        >>> smaller = map_mixtures(partial(take_experts, ids=[0, 2]), state)
        >>> smaller["count"], smaller["mean"]["experts"]["kernel"].shape
        (3, (2, 2, 1))
    """

    def changed(node: Any) -> Any:
        if not is_mixture(node):
            return node
        return operate(node) if isinstance(node, dict) else type(node)(operate(as_dicts(node)))

    return jax.tree.map(changed, tree, is_leaf=is_mixture)


def _are_ids(ids: np.ndarray, num_experts: int | None) -> bool:
    listed = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
    return listed and (num_experts is None or set(ids.tolist()) <= set(range(num_experts)))


def _some(num_experts: int | None) -> str:
    return "the experts" if num_experts is None else f"the {num_experts} experts"


def _check_noise(noise: float, key: Array | None) -> None:
    if noise and key is None:
        raise ValueError("`noise` needs a `key`: pass jax.random.key(0), or noise=0.")


def _ranked_lower(router: Params, by: np.ndarray) -> Params:
    """A router whose experts rank lower: by its balance bias, or without one by its logits."""
    if isinstance(router, dict) and "balance_bias" in router:
        return _with_lower(router, "balance_bias", by)
    return _lower_logits(router, by)


def _lower_logits(router: Params, by: np.ndarray) -> Params:
    """A router with lower logits; the same router where all would be lowered alike."""
    if by.min() == by.max():
        return router
    return with_last_of_router(router, lambda layer: _with_lower(layer, "bias", by))


def _with_lower(params: Params, name: str, by: np.ndarray) -> Params:
    if name not in params:
        raise ValueError(
            "The router must have a bias that tells the copies apart: grow to a multiple of the "
            "number of experts without `offset`, or give it a bias of zeros."
        )
    lower = lambda bias: bias - jnp.asarray(by).astype(bias.dtype)  # noqa: E731
    return {**params, name: jax.tree.map(lower, params[name])}


def _divided(dense: Params, total: float) -> Params:
    def one(leaf: Array) -> Array:
        return leaf / jnp.asarray(total, leaf.dtype) if _is_inexact(leaf) else leaf

    return with_last(dense, lambda layer: jax.tree.map(one, layer), what="layer")


def _is_inexact(leaf: Array) -> bool:
    """Whether a leaf is learned: an index or a key of an expert is not."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _perturbed(experts: Params, noise: float, key: Array) -> Params:
    """Noise on every expert but the first, in units of each leaf's own spread."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(experts))))

    def one(leaf: Array) -> Array:
        if not _is_inexact(leaf):
            return leaf
        spread = jnp.asarray(noise, leaf.dtype) * leaf.std()
        added = spread * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
        return leaf + added.at[0].set(0)

    return jax.tree.map(one, experts)
