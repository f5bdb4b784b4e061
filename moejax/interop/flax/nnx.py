"""A layer as a `flax.nnx` module."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from moejax.base import Array, Layer, Params
from moejax.interop.flax.paths import BALANCE, Axes, Path, cast, named, nested


class BalanceBias(nnx.Variable[Any]):
    """The bias of `moejax.biased`: state, moved by `moejax.update_balance_bias`.

    It is not an ``nnx.Param``, so ``nnx.grad`` and ``nnx.Optimizer(model, tx, wrt=nnx.Param)``
    leave it alone.

    Example:
        >>> from flax import nnx
        >>> router = moejax.biased(moejax.linear(4, 2), 2)
        >>> module = to_nnx(moejax.moe(moejax.glu(4, 8), router, num_experts=2), rngs=nnx.Rngs(0))
        >>> isinstance(module.router.balance_bias, BalanceBias)
        True
    """


class NnxLayer(nnx.Module):
    """A layer of moejax with given params as a module; `to_nnx` makes one with new params.

    Args:
        layer: as for `to_nnx`.
        params: of the layer, such as those of a published model; ``as_params()`` gives them back.
        axes: as for `to_nnx`.

    Example:
        >>> layer = moejax.linear(3, 2)
        >>> params = layer.init(jax.random.key(0))
        >>> module, x = NnxLayer(layer, params), jnp.ones((5, 3))
        >>> bool((module(x) == layer.apply(params, x)).all())
        True
    """

    def __init__(self, layer: Layer, params: Params, *, axes: Axes | None = None) -> None:
        self._layer = nnx.static(layer)
        self._structure = nnx.static(jax.tree.structure(params))
        leaves = named(params)
        self._paths = nnx.static(tuple(leaves))
        variables = {path: _variable(path, leaf, axes) for path, leaf in leaves.items()}
        for name, value in _modules(nested(variables)).items():
            setattr(self, name, value)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the layer's apply returns: for a mixture ``(y, decision)``.

        Args:
            *inputs: for a mixture x, shape [..., D].
            **options: for a mixture ``mask``, and ``key``, such as ``rngs.routing()``; None means
                not given, and without a key nothing is random.

        Returns:
            The layer's output.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return self._layer.apply(self.as_params(), *inputs, **given)

    def as_params(self) -> Any:
        """The params as the layer's pure functions take them."""
        leaves = [_at(self, path)[...] for path in self._paths]
        return jax.tree.unflatten(self._structure, leaves)


def to_nnx(
    layer: Layer, *, rngs: nnx.Rngs, axes: Axes | None = None, param_dtype: Any = None
) -> NnxLayer:
    """A layer as a ``flax.nnx`` module: a mixture for a Flax model of your own.

    Its parameters are ordinary ``nnx.Param`` variables with the paths of the layer's params, such
    as ``experts.gate.kernel``; a leaf called ``"balance_bias"``, as in `moejax.biased`, is a
    `BalanceBias`. A call returns what ``layer.apply`` returns. `NnxLayer` makes a module of params
    that you already have.

    Args:
        layer: from `moe`, `moe_of`, `with_shared`, `glu`, or a pair of functions of your own.
        rngs: the parameters are ``layer.init(rngs.params())``.
        axes: ``(path, array) -> names of its axes``, kept as the variables' ``out_sharding``;
            `expert_axes` puts the experts along the mesh axis "expert". If the module is made under
            ``jax.set_mesh``, its parameters are placed at once.
        param_dtype: of the parameters; by default the dtypes that ``layer.init`` makes.

    Returns:
        The module, called as ``module(x, mask=None, key=None)``.

    Example:
        >>> from flax import nnx
        >>> layer = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 3), num_experts=3)
        >>> module = to_nnx(layer, rngs=nnx.Rngs(0))
        >>> y, routing = module(jnp.ones((2, 5, 4)))
        >>> y.shape, module.experts.gate.kernel.shape
        ((2, 5, 4), (3, 4, 8))
    """
    params = cast(layer.init(rngs.params()), param_dtype)
    return NnxLayer(layer, params, axes=axes)


def _variable(path: Path, leaf: Array, axes: Axes | None) -> nnx.Variable[Any]:
    kind = BalanceBias if path[-1] == BALANCE else nnx.Param
    names = axes(path, leaf) if axes else ()
    if not names:
        return kind(leaf)
    # Without a mesh there is nowhere to put it yet; the names stay for `nnx.get_partition_spec`.
    has_mesh = not jax.sharding.get_abstract_mesh().empty
    return kind(leaf, out_sharding=names, eager_sharding=has_mesh)


def _modules(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: nnx.Dict(_modules(value)) if isinstance(value, dict) else value
        for name, value in tree.items()
    }


def _at(module: Any, path: Path) -> nnx.Variable[Any]:
    for name in path:
        module = getattr(module, name)
    return module
