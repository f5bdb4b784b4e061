"""How an experiment ends: with one line and the right exit code, whenever it is interrupted.

Nothing here takes long to import, so that a script can call `prepare` before what does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Act = Callable[[int], None]


class EndedError(Exception):
    """The end of a run, in one line.

    Args:
        message: what happened and what to do.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class RefusedError(EndedError):
    """What was asked for cannot be done."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=2)


class _Watch:
    # What a signal does now, the pipe that tells of one, and what is done before it ends the run.
    act: Act
    pipe: int | None = None
    before_the_end: list[Callable[[], object]] = []  # noqa: RUF012  there is one process


def prepare() -> None:
    """From here on a signal or a missing package ends the process with one line.

    No terminal can stop a run, either.

    Python runs a handler only between two of its instructions, and one that compiles with XLA takes
    seconds. So the handlers do nothing; a thread reads the signal from a pipe, and acts at once.
    """
    os.environ["MPLBACKEND"] = "agg"  # no picture needs a window, whatever a notebook has set
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _one_line_for_missing_packages
    _Watch.act = end_at_once
    if _Watch.pipe is None:
        reader, _Watch.pipe = os.pipe()
        os.set_blocking(_Watch.pipe, False)
        threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, frame: None)
    signal.set_wakeup_fd(_Watch.pipe, warn_on_full_buffer=False)


def _one_line_for_missing_packages(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, ModuleNotFoundError):
        name = Path(sys.argv[0]).name
        print(f"{name}: {error}: pip install -e '.[experiments]'", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _listen(reader: int) -> None:
    while True:
        for signum in os.read(reader, 64):
            if signum in SIGNALS:
                _Watch.act(signum)


def end_at_once(signum: int) -> None:
    """Ends the process with one line and the exit code of the signal."""
    for clean in reversed(_Watch.before_the_end):
        with contextlib.suppress(OSError):
            clean()
    name, program = signal.Signals(signum).name, Path(sys.argv[0]).name
    with contextlib.suppress(OSError):
        os.write(2, f"{program}: {name}: stopped before the end\n".encode())
    os._exit(128 + signum)


@contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """Notes the first signal instead of ending the process; the second ends it.

    Returns:
        A context manager that gives a function: the signal that has come, or None.
    """
    noted: list[int] = []

    def note(signum: int) -> None:
        noted.append(signum)
        _Watch.act = end_at_once

    _Watch.act = note
    try:
        yield lambda: noted[0] if noted else None
    finally:
        _Watch.act = end_at_once


@contextmanager
def before_the_end(clean: Callable[[], object]) -> Iterator[None]:
    """Within it, a signal that ends the process has this done first; otherwise it is not done."""
    _Watch.before_the_end.append(clean)
    try:
        yield
    finally:
        _Watch.before_the_end.remove(clean)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives another name to write a file under; the file gets its own name once it is complete."""
    other = path.with_name(f".{path.stem}.partial{path.suffix}")
    with before_the_end(other.unlink):
        try:
            yield other
            os.replace(other, path)
        finally:
            with contextlib.suppress(OSError):  # it is gone where all went well
                other.unlink()


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the command with what the library or a loader says about its options.

    Raises:
        RefusedError: for a ValueError.
        EndedError: for what is missing: a network, a package.
    """
    try:
        yield
    except ValueError as error:
        raise RefusedError(str(error)) from error
    except (ConnectionError, ImportError) as error:
        raise EndedError(str(error)) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for what a program cannot help: disks, memory, devices."""
    try:
        yield
    except EndedError as ended:
        _exit(ended.code, str(ended))
    except BrokenPipeError:
        _exit(128 + 13, "")  # as SIGPIPE would
    except OSError as error:
        _exit(1, str(error))
    except MemoryError as error:
        _exit(1, f"out of memory: {error}")
    except RuntimeError as error:  # XLA's errors, among them jax.errors.JaxRuntimeError
        if not _is_of_the_machine(str(error)):
            raise
        _exit(1, str(error).splitlines()[0])


def _is_of_the_machine(message: str) -> bool:
    signs = ("RESOURCE_EXHAUSTED", "Out of memory", "Unable to initialize backend")
    return any(sign in message for sign in signs)


def _exit(code: int, message: str) -> Any:
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
