"""Reading checkpoints, and refusing those that differ from what was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.folder import apart, named_in_utf8, orbax, steps_in
from moejax.checkpoint.manifest import (
    DamagedError,
    Manifest,
    check_leaf,
    check_manifest,
    check_structure,
    is_key,
    named_leaves,
    step_number,
)


class Checkpoint(NamedTuple):
    """What `restore` returns.

    Attributes:
        step: its number.
        state: the pytree that was saved.
        config: what was saved with it.
        versions: of Python and the libraries that wrote it; the same steps give the same bits
            only with the same versions.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     moejax.checkpoint.save(folder, {"x": np.ones(2)}, step=7, config={"rate": 0.1})
        ...     found = moejax.checkpoint.restore(folder, {"x": np.zeros(2)})
        >>> found.step, found.config, found.state["x"]
        (7, {'rate': 0.1}, array([1., 1.]))
    """

    step: int
    state: Any
    config: dict[str, Any]
    versions: dict[str, str]


def restore(folder: str | Path, like: Any, *, step: SupportsIndex | None = None) -> Checkpoint:
    """Reads a checkpoint back, bit for bit as it was saved, weak types included.

    Args:
        folder: where the checkpoints of a run are.
        like: a pytree of arrays or ``jax.ShapeDtypeStruct``, with the structure, shapes and dtypes
            that were saved. A leaf that is placed (committed, or with a sharding) says where the
            restored one goes; the number of devices may differ from when it was saved.
        step: which one, an integer or a scalar array of one; by default the newest.

    Returns:
        The step, the state, the configuration and the versions.

    Raises:
        ValueError: if there is no such checkpoint, or the step is not an integer; if it is damaged,
            naming the newest one before it that is intact; if its structure, a shape or a dtype
            differs from ``like``, naming the leaf; if the folder is not named in UTF-8.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> moejax.checkpoint.save(folder, {"w": jnp.arange(3.0)}, step=10, config={"seed": 0})
        >>> checkpoint = restore(folder, {"w": jnp.zeros(3)})
        >>> checkpoint.step, checkpoint.state["w"].tolist(), checkpoint.config
        (10, [0.0, 1.0, 2.0], {'seed': 0})
    """
    path = _find(folder, step)
    with _refusing_damage(path):
        manifest, leaves = _read(path, named_leaves(like))
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Checkpoint(int(path.name), state, manifest["config"], manifest["versions"])


def read_config(folder: str | Path, *, step: SupportsIndex | None = None) -> dict[str, Any]:
    """Reads only the configuration, from which to build the ``like`` of `restore`.

    Args:
        folder: where the checkpoints of a run are.
        step: which one, an integer or a scalar array of one; by default the newest.

    Returns:
        What was saved as ``config``.

    Raises:
        ValueError: if there is no such checkpoint, if the step is not an integer, if its manifest
            is damaged, or if the folder is not named in UTF-8.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> moejax.checkpoint.save(folder, jnp.ones(3), step=10, config={"seed": 0})
        >>> read_config(folder)
        {'seed': 0}
    """
    path = _find(folder, step)
    with _refusing_damage(path), _reader() as read:
        return _read_manifest(read, path)["config"]


def _find(folder: str | Path, step: SupportsIndex | None) -> Path:
    folder = named_in_utf8(folder)
    steps = sorted(steps_in(folder))
    wanted = step if step is None else step_number(step)
    if not steps or wanted not in [None, *steps]:
        raise ValueError(
            f"There must be a checkpoint {'' if step is None else f'of step {step} '}in {folder}; "
            f"it has {steps or 'none'}."
        )
    return folder / str(steps[-1] if wanted is None else wanted)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        report = f"Checkpoint {path.name} in {path.parent} is damaged: {error}."
        for earlier in sorted(steps_in(path.parent), reverse=True):
            if earlier < int(path.name) and _is_intact(path.with_name(str(earlier))):
                raise ValueError(
                    f"{report} The one before it is intact: step {earlier}."
                ) from error
        raise ValueError(f"{report} There is no intact one before it.") from error


def _is_intact(path: Path) -> bool:
    try:
        _read(path)
    except DamagedError:
        return False
    return True


@contextmanager
def _reader() -> Iterator[Callable[..., Any]]:
    with orbax() as ocp, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        yield partial(_read_item, reader)


def _read(path: Path, like: dict[str, Any] | None = None) -> tuple[Manifest, list[Any]]:
    # Reads one checkpoint and checks it; without `like`, no leaves are returned.
    with _reader() as read:
        manifest = _read_manifest(read, path)
        entries = manifest["leaves"]
        if like is None:
            for name, entry in entries.items():
                _read_leaf(read, path, name, entry)
            return manifest, []
        check_structure(entries, like)
        return manifest, [
            _placed(_read_leaf(read, path, name, entries[name]), entries[name], leaf)
            for name, leaf in like.items()
        ]


def _read_manifest(read: Callable[..., Any], path: Path) -> Manifest:
    from orbax.checkpoint import args

    manifest = read(path, manifest=args.JsonRestore())
    check_manifest(manifest, int(path.name))
    return manifest


def _read_leaf(
    read: Callable[..., Any], path: Path, name: str, entry: Manifest
) -> np.ndarray | None:
    # One at a time: the first that orbax cannot read would leave the others pending.
    from orbax.checkpoint import RestoreArgs, args

    if not math.prod(entry["shape"]):
        return None  # nothing to read
    leaf = {name: RestoreArgs(restore_type=np.ndarray)}
    restore_args = args.PyTreeRestore(item=leaf, restore_args=leaf, partial_restore=True)
    array = read(path, state=restore_args)[name]
    check_leaf(name, array, entry)
    return array


def _read_item(reader: Any, path: Path, **item: Any) -> Any:
    from orbax.checkpoint import args

    try:
        [value] = apart(reader.restore, path, args=args.Composite(**item)).values()
    except Exception as error:  # whatever orbax, tensorstore or JSON make of wrong bytes
        reason = next(iter(str(error).splitlines()), "")
        raise DamagedError(f"{type(error).__name__}: {reason}") from error
    return value


def _placed(array: np.ndarray | None, entry: Manifest, like: Any) -> Any:
    # The array, converted to the kind of `like` and placed on its devices.
    if isinstance(like, (np.ndarray, np.generic)):
        return like if array is None else array.astype(like.dtype)  # in its byte order
    leaf: Any = array
    if array is None:
        leaf = jnp.zeros(like.shape, like.dtype)
    elif is_key(like):
        leaf = jax.random.wrap_key_data(jnp.asarray(array), impl=entry["impl"])
    if entry.get("weak_type"):
        leaf = _weak(jnp.asarray(leaf))
    sharding = _sharding(like)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Over several processes, which have all read the same; `device_put` gives no PRNG key to them.
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)


def _weak(array: jax.Array) -> jax.Array:
    # An array filled with a Python number is weakly typed, and as wide as such numbers are here.
    weak = jnp.full(array.shape, np.zeros((), array.dtype).item())
    return weak.at[...].set(array) if weak.dtype == array.dtype else array


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    # An uncommitted array follows the others to their device, and so must the restored one.
    return leaf.sharding if getattr(leaf, "committed", True) else None
