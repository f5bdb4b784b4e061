"""Flax and moejax, both ways: modules as layers, and layers as modules.

- `from_nnx`, `from_linen`: your module becomes an expert or a router.
- `to_nnx`, `to_linen`: a mixture, or any other layer, becomes a module of your model.
- `NnxLayer`, `linen_variables`: the same with params that you already have.
"""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Flax modules need flax, which is not installed: pip install 'moejax[flax]'."
    ) from error

from moejax.interop.flax.incoming import from_linen, from_nnx
from moejax.interop.flax.linen import LinenLayer, linen_variables, to_linen
from moejax.interop.flax.nnx import BalanceBias, NnxLayer, to_nnx
from moejax.interop.flax.paths import Axes, Path, expert_axes

__all__ = [
    "Axes",
    "BalanceBias",
    "LinenLayer",
    "NnxLayer",
    "Path",
    "expert_axes",
    "from_linen",
    "from_nnx",
    "linen_variables",
    "to_linen",
    "to_nnx",
]
