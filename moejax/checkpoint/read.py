"""Reading checkpoints, and refusing those that are not what was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.folder import apart, orbax, steps_in
from moejax.checkpoint.manifest import (
    DamagedError,
    Manifest,
    check_leaf,
    check_manifest,
    check_structure,
    is_key,
    named_leaves,
)


class Checkpoint(NamedTuple):
    """What `restore` returns.

    Attributes:
        step: its number.
        state: the pytree that was saved.
        config: what was saved with it.
        versions: of Python and the libraries that wrote it; the same steps give the same bits
            with the same versions only.
    """

    step: int
    state: Any
    config: dict[str, Any]
    versions: dict[str, str]


def restore(folder: str | Path, like: Any, *, step: int | None = None) -> Checkpoint:
    """Reads a checkpoint back, bit by bit what was saved.

    Args:
        folder: where the checkpoints of a run are.
        like: a pytree of the structure, shapes and dtypes that were saved, of arrays or of
            ``jax.ShapeDtypeStruct``. A leaf that is placed (committed, or with a sharding) says
            where the restored one goes; the number of devices may differ from when it was saved.
        step: which one; by default the newest.

    Returns:
        The step, the state, the configuration and the versions.

    Raises:
        ValueError: if there is no such checkpoint; if it is damaged, naming the newest one before
            it that is intact; if its structure, a shape or a dtype is not that of ``like``,
            naming the leaf.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> moejax.checkpoint.save(folder, {"w": jnp.arange(3.0)}, step=10, config={"seed": 0})
        >>> checkpoint = restore(folder, {"w": jnp.zeros(3)})
        >>> checkpoint.step, checkpoint.state["w"].tolist(), checkpoint.config
        (10, [0.0, 1.0, 2.0], {'seed': 0})
    """
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        raise ValueError(
            f"There must be a checkpoint {'' if step is None else f'of step {step} '}in {folder}; "
            f"it has {sorted(steps) or 'none'}."
        )
    try:
        manifest, leaves = _read(folder / str(step), named_leaves(like))
    except DamagedError as error:
        raise ValueError(_report_of_damage(folder, step, error)) from error
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Checkpoint(step, state, manifest["config"], manifest["versions"])


def _read(folder: Path, like: dict[str, Any] | None = None) -> tuple[Manifest, list[Any]]:
    # Reads one checkpoint and checks it; without `like` that is all.
    with orbax() as ocp, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        manifest = _read_item(reader, folder, manifest=ocp.args.JsonRestore())
        check_manifest(manifest, int(folder.name))
        if like is not None:
            check_structure(manifest["leaves"], like)
        leaves = []
        for name in like or manifest["leaves"]:
            array = _read_leaf(reader, folder, name, manifest["leaves"][name])
            if like is not None:
                leaves.append(_placed(array, manifest["leaves"][name], like[name]))
    return manifest, leaves


def _read_leaf(reader: Any, folder: Path, name: str, entry: Manifest) -> np.ndarray | None:
    # One at a time: the first that orbax cannot read would leave the others pending.
    from orbax.checkpoint import RestoreArgs, args

    if not math.prod(entry["shape"]):
        return None  # nothing to read
    leaf = {name: RestoreArgs(restore_type=np.ndarray)}
    restore_args = args.PyTreeRestore(item=leaf, restore_args=leaf, partial_restore=True)
    array = _read_item(reader, folder, state=restore_args)[name]
    check_leaf(name, array, entry)
    return array


def _read_item(reader: Any, folder: Path, **item: Any) -> Any:
    from orbax.checkpoint import args

    try:
        [value] = apart(reader.restore, folder, args=args.Composite(**item)).values()
    except Exception as error:  # whatever orbax, tensorstore or JSON make of wrong bytes
        reason = next(iter(str(error).splitlines()), "")
        raise DamagedError(f"{type(error).__name__}: {reason}") from error
    return value


def _placed(array: np.ndarray | None, entry: Manifest, like: Any) -> Any:
    # The array, of the kind and on the devices of the one it is to be like.
    if isinstance(like, (np.ndarray, np.generic)):
        return like if array is None else array
    leaf: Any = array
    if array is None:
        leaf = jnp.zeros(like.shape, like.dtype)
    elif is_key(like):
        leaf = jax.random.wrap_key_data(jnp.asarray(array), impl=entry["impl"])
    return jax.device_put(leaf, _sharding(like))


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    # An array that is not committed goes where the others are; so must its restored twin.
    return leaf.sharding if getattr(leaf, "committed", True) else None


def _report_of_damage(folder: Path, step: int, error: DamagedError) -> str:
    report = f"Checkpoint {step} in {folder} is damaged: {error}."
    for earlier in sorted(steps_in(folder), reverse=True):
        if earlier < step and _is_intact(folder / str(earlier)):
            return f"{report} The one before it, {earlier}, is intact: ask for `step={earlier}`."
    return f"{report} There is no intact one before it."


def _is_intact(folder: Path) -> bool:
    try:
        _read(folder)
    except DamagedError:
        return False
    return True
