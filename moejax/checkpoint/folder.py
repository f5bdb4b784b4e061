"""The folder of a run's checkpoints, and orbax, which fills it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from moejax._paths import local

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder until it is complete


def latest(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, None if there is none.

    Args:
        folder: where the checkpoints of a run are.

    Returns:
        Its step.

    Example:
        >>> import tempfile
        >>> latest(tempfile.mkdtemp()) is None
        True
    """
    return max(steps_in(local(folder)), default=None)


def discard(folder: str | Path, *, after: int) -> None:
    """Deletes the checkpoints after a step, to go on from it instead of from the newest.

    With several processes every one calls it; the first deletes, and the others wait for it.

    Args:
        folder: where the checkpoints of a run are.
        after: the last step to keep.

    Example:
        >>> import tempfile
        >>> from moejax import checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> with checkpoint.writer(folder) as save_one:
        ...     save_one(jnp.ones(1), step=10)
        ...     save_one(jnp.ones(1), step=20)
        >>> discard(folder, after=10)
        >>> latest(folder)
        10
    """
    folder = local(folder)
    for step in sorted(steps_in(folder), reverse=True):
        if step > after:
            on_first_process(delete, folder / str(step))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("moejax.checkpoint.discard")


def on_first_process(function: Callable[[Path], None], path: Path) -> None:
    """Calls a function in the first of several processes, which share the folder."""
    if jax.process_index() == 0:
        function(path)


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint; if the process is killed meanwhile, none is left half deleted."""
    remains = checkpoint.with_name(f"{checkpoint.name}.deleted{UNFINISHED}")
    shutil.rmtree(remains, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(remains))


def clear(folder: Path) -> None:
    """Deletes what killed processes have left behind."""
    for remains in folder.glob(f"*{UNFINISHED}*"):
        if remains.is_dir():
            shutil.rmtree(remains)


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete checkpoints: orbax renames a folder to its step at the end.

    A file of that name, or a folder such as ``0020``, is somebody else's.
    """
    if not folder.is_dir():
        return []
    numbered = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return [int(path.name) for path in numbered if path.name == str(int(path.name))]


def named_in_utf8(folder: str | Path) -> Path:
    """The absolute path of a folder whose name orbax can take.

    Raises:
        ValueError: if it is not UTF-8; orbax would call its checkpoints damaged.
    """
    path = local(folder)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"The path must be one in UTF-8, got {str(path)!a}: set PYTHONUTF8=1, or choose "
            "another folder."
        ) from None
    return path


@contextmanager
def orbax() -> Iterator[ModuleType]:
    """Orbax, loaded where it is used, leaving the logging of the process as it was."""
    # Orbax logs with absl, which installs a root handler for the whole process at its first message
    # if there is none. While orbax works, a handler like Python's last resort prevents that, and is
    # removed afterwards; what orbax would print is raised as an exception anyway.
    stand_in = logging.StreamHandler()
    stand_in.setLevel(logging.WARNING)
    stand_in.addFilter(lambda record: "orbax" not in record.pathname)
    unconfigured = not logging.root.handlers
    if unconfigured:
        logging.root.addHandler(stand_in)
    try:
        yield _imported()
    finally:
        if unconfigured:
            logging.root.removeHandler(stand_in)


def _imported() -> ModuleType:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints need orbax-checkpoint, which is not installed: "
            "pip install 'moejax[flax]' or pip install orbax-checkpoint."
        ) from error
    return orbax.checkpoint


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of orbax in a thread of its own, and waits.

    In the caller's thread it would take away the event loop, and patch a running one; and a signal
    that the caller handles could interrupt it halfway.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()
