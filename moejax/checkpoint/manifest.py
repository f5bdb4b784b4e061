"""What a checkpoint says about itself: its leaves with their SHA-256, configuration and versions.

The manifest is JSON, and carries a SHA-256 of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import operator
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax._version import VERSION

Manifest = dict[str, Any]

# What orbax can write, and JAX can read.
DTYPES = (
    *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"),
    *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "complex64", "complex128"),
)
_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")


class DamagedError(Exception):
    """A checkpoint that differs from what was written."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their place in it, such as ``params.router.kernel``.

    Args:
        tree: a pytree of arrays (of anything with a shape and a dtype).

    Returns:
        The leaves by name, in the order of the pytree.

    Raises:
        ValueError: if a leaf is not an array, or two leaves have one name.

    Example:
        >>> list(named_leaves({"params": {"w": jnp.ones(2)}, "step": jnp.array(1)}))
        ['params.w', 'step']
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"Every leaf must be an array, but `{name}` is a {type(leaf)}.")
        if name in named:
            raise ValueError(f"Every leaf must have its own name, but two are called `{name}`.")
        named[name] = leaf
    return named


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed PRNG keys, which are stored as their data."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> Any:
    """What is stored for a leaf: itself, in this machine's byte order, or the data of PRNG keys."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    host = np.asarray(leaf)
    return host.astype(host.dtype.newbyteorder("="))


def step_number(step: Any) -> int:
    """The number of a checkpoint, given as an integer or a scalar array of one.

    Raises:
        ValueError: if it is neither, or negative: the names of checkpoints are digits.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"`step` must be an integer of at least 0, got {step!r}.")
    return number


def versions() -> dict[str, str]:
    """The versions of Python and of the installed libraries that a result depends on."""
    found = {"moejax": VERSION, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # flax may be absent
            found[name] = importlib.metadata.version(name)
    return found


def describe(leaves: dict[str, Any], step: int, config: dict[str, Any]) -> Manifest:
    """Makes the manifest of a state.

    Args:
        leaves: the leaves by name.
        step: the number of the checkpoint.
        config: anything that JSON can hold.

    Returns:
        JSON: the step, the configuration, the versions, the shape, dtype and SHA-256 of every
        leaf, and the SHA-256 of all that.

    Raises:
        ValueError: if the configuration is not JSON, or a leaf is of a dtype that cannot be stored.
    """
    try:
        config = json.loads(json.dumps(config))
    except TypeError as error:
        raise ValueError(f"`config` must be something that JSON can hold: {error}.") from error
    entries = {name: _entry(name, leaf) for name, leaf in leaves.items()}
    content = {"step": step, "config": config, "versions": versions(), "leaves": entries}
    return {**content, "sha256": _digest_of_json(content)}


def check_manifest(manifest: Manifest, step: int) -> None:
    """Checks a manifest against its own SHA-256, and the step that its folder is named after.

    Raises:
        DamagedError: if they differ, or it is no manifest.
    """
    if not isinstance(manifest, dict):
        raise DamagedError("its manifest is not a JSON object")
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if _digest_of_json(content) != manifest.get("sha256"):
        raise DamagedError("its manifest differs from its SHA-256")
    if content["step"] != step:
        raise DamagedError(f"it is of step {content['step']}, so rename its folder to that")


def check_structure(entries: dict[str, Manifest], like: dict[str, Any]) -> None:
    """Checks that the leaves wanted are the ones that were saved, before any is read.

    Raises:
        ValueError: naming a leaf that is missing, or has another shape or dtype.
    """
    missing, unknown = sorted(like.keys() - entries), sorted(entries.keys() - like)
    if missing or unknown:
        raise ValueError(
            "The structure must be the one that was saved: "
            f"the checkpoint lacks {_listed(missing)} and has {_listed(unknown)} besides."
        )
    for name, leaf in like.items():
        saved, wanted = entries[name], {"shape": list(leaf.shape), "dtype": dtype_name(leaf)}
        for what, value in wanted.items():
            if saved[what] != value:
                raise ValueError(
                    f"The {what} of leaf `{name}` must be the one that was saved, {saved[what]}; "
                    f"got {value}."
                )
        if not isinstance(leaf, np.ndarray | np.generic):
            _check_width(name, leaf)


def _check_width(name: str, leaf: Any) -> None:
    # JAX would silently make the numbers half as wide.
    if is_key(leaf):
        return
    narrowed = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if narrowed != leaf.dtype:
        raise ValueError(
            f"Leaf `{name}` holds {leaf.dtype}, of which JAX would make {narrowed}: enable "
            "jax_enable_x64, or give a NumPy array for it."
        )


def check_leaf(name: str, array: Any, entry: Manifest) -> None:
    """Checks a leaf that was read, bit by bit.

    Raises:
        DamagedError: if it is not what was saved.
    """
    if digest(array) != entry["sha256"]:
        raise DamagedError(f"leaf `{name}` differs from its SHA-256")


def digest(array: Any) -> str:
    """The SHA-256 of an array's dtype, shape and bytes, wherever its parts lie."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.asarray(array)
    sha256 = hashlib.sha256(f"{host.dtype} {host.shape}".encode())
    sha256.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def dtype_name(leaf: Any) -> str:
    """The name of a leaf's dtype, whatever the order of its bytes in memory."""
    return str(leaf.dtype if is_key(leaf) else np.dtype(leaf.dtype).newbyteorder("="))


def _entry(name: str, leaf: Any) -> Manifest:
    dtype = dtype_name(leaf)
    if not (is_key(leaf) or dtype in DTYPES):
        raise ValueError(f"Every leaf must be of a dtype that JAX has, but `{name}` is {dtype}.")
    entry: Manifest = {"shape": list(leaf.shape), "dtype": dtype, "sha256": digest(stored(leaf))}
    if is_key(leaf):
        entry["impl"] = str(jax.random.key_impl(leaf))
    elif getattr(leaf, "weak_type", False):
        entry["weak_type"] = True
    return entry


def _digest_of_json(content: Manifest) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return (shown + (", ..." if len(names) > 3 else "")) or "nothing"
