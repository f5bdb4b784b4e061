"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0
PATIENCE = 2.0  # seconds without a word


def on_terminal() -> bool:
    """Whether someone watches standard error, which is None where it is closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def note(text: str) -> None:
    """Prints on standard error, if it is there."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def clear_bar() -> None:
    """Makes room for a line where a bar may stand; the bar draws itself again below."""
    if on_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Says on a terminal or in a notebook what is going on, if it takes longer than a moment.

    Args:
        description: what is going on, such as "compiling the training step".
    """
    if not (on_terminal() or "ipykernel" in sys.modules):
        yield
        return
    timer = threading.Timer(PATIENCE, note, [f"{description} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yields the items unchanged and reports on standard error how many have been consumed.

    Args:
        items: what to iterate over.
        description: what stands before the bar, or at the start of each plain line.
        total: the number of items, where ``len(items)`` does not tell.

    Returns:
        An iterator over the same items in the same order.

    Example:
        >>> sum(progress([1, 2, 3], "adding"))
        6
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if on_terminal() and find_spec("tqdm") is not None:
        from tqdm import tqdm

        return iter(tqdm(items, desc=description, total=total, file=sys.stderr))
    return _plain_lines(items, description, total)


def _plain_lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.perf_counter()
    of_total = "" if total is None else f"/{total}"
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES and count != total:
            last = now
            note(f"{description}: {count}{of_total}")
    seconds = time.perf_counter() - start
    note(f"{description}: {count}{of_total} in {seconds:.1f} s")
