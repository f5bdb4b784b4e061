"""Writing checkpoints, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, SupportsIndex

from moejax.checkpoint.folder import (
    apart,
    clear,
    delete,
    latest,
    named_in_utf8,
    on_first_process,
    orbax,
    steps_in,
)
from moejax.checkpoint.manifest import describe, named_leaves, step_number, stored

Save = Callable[..., None]  # (state, *, step, config=None)


def save(
    folder: str | Path,
    state: Any,
    *,
    step: SupportsIndex,
    config: dict[str, Any] | None = None,
    keep: int | None = 3,
) -> None:
    """Saves one checkpoint, and returns when it is complete.

    Args:
        folder: where the checkpoints of a run are, on this machine; made if missing.
        state: any pytree of arrays: parameters, optimizer state, router state, PRNG keys.
        step: its number, an integer of at least zero, larger than the step of every checkpoint in
            the folder; a scalar array, such as ``state.step``, will do.
        config: anything that JSON can hold.
        keep: how many to keep; older ones are deleted. None keeps all.

    Raises:
        ValueError: if a leaf is not an array of a dtype that JAX has, the configuration is not
            JSON, the step is not an integer of at least zero, the folder holds a checkpoint of this
            step or a later one, or the folder is an address on another machine or not named in
            UTF-8.
        OSError: if it cannot be written. The checkpoints before it are untouched.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, {"w": jnp.arange(3.0)}, step=10, config={"seed": 0})
        >>> latest(folder)
        10
    """
    with writer(folder, keep=keep) as save_one:
        save_one(state, step=step, config=config)


@contextmanager
def writer(folder: str | Path, *, keep: int | None = 3) -> Iterator[Save]:
    """Opens a folder for a run that saves as it goes, without waiting for the disk.

    Each save copies the state, takes its SHA-256, and returns while the files are written in the
    background; it waits for the save before it. An error in the background is raised by the next
    save or on leaving, which waits for the last one. Remains of saves that were killed are
    deleted. A folder has one writer at a time.

    Args:
        folder: where the checkpoints of the run are; made if missing.
        keep: how many to keep; older ones are deleted once a new one is complete. None keeps all.

    Returns:
        A context manager that gives ``save(state, *, step, config=None)``.

    Raises:
        ValueError: if ``keep`` is not a positive integer, or the folder is an address on another
            machine or not named in UTF-8.
        OSError: if the folder cannot be made.
        RuntimeError: in ``save``, after the ``with`` block.

    Example:
        >>> import tempfile
        >>> with writer(tempfile.mkdtemp(), keep=2) as save_one:
        ...     for step in (10, 20, 30):
        ...         save_one({"w": jnp.full(3, step)}, step=step)
    """
    if keep is not None and not (isinstance(keep, Integral) and keep >= 1):
        raise ValueError(
            f"`keep` must be an integer of at least 1, or None to keep all, got {keep}."
        )
    folder = named_in_utf8(folder)
    with orbax() as ocp:
        with _write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            on_first_process(clear, folder)
            background = apart(ocp.AsyncCheckpointer, ocp.CompositeCheckpointHandler())
        ended = threading.Event()
        try:
            yield partial(_save, background, folder, keep, ended)
        finally:
            ended.set()
            try:
                _finish(background, folder, keep)
            finally:
                apart(background.close)


def _finish(background: Any, folder: Path, keep: int | None) -> None:
    # Waits for the save in progress, and deletes the checkpoints that it makes superfluous.
    with _write_errors(folder):
        apart(background.wait_until_finished)
        for step in sorted(steps_in(folder), reverse=True)[keep:] if keep else []:
            on_first_process(delete, folder / str(step))


def _save(
    background: Any,
    folder: Path,
    keep: int | None,
    ended: threading.Event,
    state: Any,
    *,
    step: SupportsIndex,
    config: dict[str, Any] | None = None,
) -> None:
    from orbax.checkpoint import args

    if ended.is_set():  # orbax would return, and report in another thread
        raise RuntimeError(f"The writer of {folder} has ended: save inside the `with` block.")
    step = step_number(step)
    leaves = named_leaves(state)
    manifest = describe(leaves, step, {} if config is None else config)
    arrays = {name: stored(leaf) for name, leaf in leaves.items() if leaf.size}
    if not arrays:
        raise ValueError("The state to save must hold at least one array that is not empty.")
    _finish(background, folder, keep)
    if (newest := latest(folder)) is not None and newest >= step:
        raise ValueError(
            f"`step` must be larger than that of the newest checkpoint in {folder} ({newest}), "
            f"got {step}. Use another folder, or `discard` the later ones."
        )
    items = args.Composite(state=args.PyTreeSave(arrays), manifest=args.JsonSave(manifest))
    with _write_errors(folder):
        apart(background.save, folder / str(step), args=items)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises ValueError
        raise OSError(
            f"A checkpoint could not be written to {folder}; the newest complete one is "
            f"{latest(folder)}. The reason: {error}"
        ) from error
