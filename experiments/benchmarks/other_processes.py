"""Other processes: how much of the machine they take, and the end of those started here.

Where others take much, a timing is worth little.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Seconds since the machine's or the process's start."""

    wall: float
    machine: float
    process: float


def processor_seconds() -> Usage | None:
    """The processor time of the machine and of this process; None where Linux does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = (int(field) for field in fields[:8])
    ticks = user + nice + system + sum(interrupts)
    return Usage(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))


def busy_elsewhere(before: Usage | None, after: Usage | None) -> float | None:
    """The share of the machine that other processes took meanwhile."""
    if before is None or after is None:
        return None
    wall, machine, process = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, (machine - process) / (wall * (os.cpu_count() or 1)))


def page_faults() -> int:
    """How many pages of memory the system has given this process; 0 where it does not tell."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # on Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def kill_children() -> None:
    """Ends the processes that this one has started by `multiprocessing`."""
    for child in multiprocessing.active_children():
        child.kill()
