"""A layer as a `flax.linen` module."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen

from moejax._calling import accepts
from moejax._checks import check_present
from moejax.base import Array, Layer, Params
from moejax.interop.flax.paths import BALANCE, Axes, Path, at, cast, named, nested, path_of

COLLECTION = "balance"


class LinenLayer(linen.Module):
    """A layer of moejax as a module; made by `to_linen`.

    Attributes:
        layer: the pair of pure functions.
        axes: ``(path, array) -> names of its axes``, or None.
        param_dtype: of the parameters; None for the dtypes that ``layer.init`` makes.

    Example:
        >>> module = LinenLayer(moejax.linear(3, 2))
        >>> y, variables = module.init_with_output(jax.random.key(0), jnp.ones((5, 3)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((5, 2), (3, 2))
    """

    layer: Layer
    axes: Axes | None = None
    param_dtype: Any = None

    @linen.compact
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the layer's apply returns: for a mixture ``(y, decision)``.

        Args:
            *inputs: for a mixture x, shape [..., D].
            **options: for a mixture ``mask`` and ``key``; None means not given. Without a key, a
                layer that takes one is given one from the random stream "routing", if there is one.

        Returns:
            The layer's output.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if "key" not in given and accepts(self.layer.apply, "key") and self.has_rng("routing"):
            given["key"] = self.make_rng("routing")
        return self.layer.apply(self._params(), *inputs, **given)

    def _params(self) -> Any:
        like = jax.eval_shape(self.layer.init, jax.random.key(0))
        leaves, structure = jax.tree.flatten_with_path(like)
        paths = [path_of(entries) for entries, _ in leaves]
        missing = {(_place(path)[0], *path) for path in paths if not self._has(path)}
        if missing and self.is_initializing():
            self._create()
        else:
            check_present(missing)
        found = [at(self._variable(path), path[1:]) for path in paths]
        return jax.tree.unflatten(structure, found)

    def _variable(self, path: Path) -> Any:
        return linen.meta.unbox(self.get_variable(*_place(path)))

    def _has(self, path: Path) -> bool:
        if not self.has_variable(*_place(path)):
            return False
        inner = self._variable(path)
        for name in path[1:]:
            if name not in inner:
                return False
            inner = inner[name]
        return True

    def _create(self) -> None:
        made = named(cast(self.layer.init(self.make_rng("params")), self.param_dtype))
        boxed = {path: self._boxed(path, leaf) for path, leaf in made.items()}
        for collection, variables in _collections(boxed).items():
            for name, value in variables.items():
                self.put_variable(collection, name, value)

    def _boxed(self, path: Path, leaf: Array) -> Any:
        names = self.axes(path, leaf) if self.axes else ()
        return linen.Partitioned(leaf, names) if names else leaf


def to_linen(layer: Layer, *, axes: Axes | None = None, param_dtype: Any = None) -> LinenLayer:
    """A layer as a ``flax.linen`` module: a mixture for a Flax model of your own.

    Its parameters are in the collection "params" with the paths of the layer's params, such as
    ``experts/gate/kernel``; a leaf called ``"balance_bias"``, as in `moejax.biased`, is in the
    collection "balance". A call returns what ``layer.apply`` returns. `linen_variables` makes its
    variables of params that you already have.

    Args:
        layer: from `moe`, `moe_of`, `with_shared`, `glu`, or a pair of functions of your own.
        axes: ``(path, array) -> names of its axes``, kept as ``linen.Partitioned``; `expert_axes`
            puts the experts along the mesh axis "expert".
        param_dtype: of the parameters; by default the dtypes that ``layer.init`` makes.

    Returns:
        The module, called as ``module(x, mask=None, key=None)``; a random stream "routing" serves
        in place of the key.

    Raises:
        ValueError: in apply, if the variables lack a parameter of the layer.

    Example:
        >>> layer = moejax.moe(moejax.glu(4, 8), moejax.linear(4, 3), num_experts=3)
        >>> module, x = to_linen(layer), jnp.ones((2, 5, 4))
        >>> variables = module.init(jax.random.key(0), x)
        >>> y, routing = module.apply(variables, x)
        >>> y.shape, variables["params"]["experts"]["gate"]["kernel"].shape
        ((2, 5, 4), (3, 4, 8))
    """
    return LinenLayer(layer, axes, param_dtype)


def linen_variables(params: Params) -> dict[str, Any]:
    """Params of a layer as the variables of its module, such as those of a published model.

    Lists and tuples become dicts with the keys "0", "1", ...; a leaf called ``"balance_bias"`` goes
    to the collection "balance".

    Args:
        params: of the layer that `to_linen` gets.

    Returns:
        The collections, nested dicts, that ``to_linen(layer).init`` would make.

    Example:
        >>> layer = moejax.mlp(4, 8, 2)
        >>> params, x = layer.init(jax.random.key(0)), jnp.ones((5, 4))
        >>> y = to_linen(layer).apply(linen_variables(params), x)
        >>> bool((y == layer.apply(params, x)).all())
        True
    """
    return _collections(named(params))


def _collections(leaves: dict[Path, Any]) -> dict[str, Any]:
    return nested({(_place(path)[0], *path): leaf for path, leaf in leaves.items()})


def _place(path: Path) -> tuple[str, str]:
    return (COLLECTION if path[-1] == BALANCE else "params"), path[0]
