"""Speed of the same training in both frameworks: in turns, in one process, on as many threads."""

from __future__ import annotations

import glob
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from benchmarks.other_processes import busy_elsewhere, processor_seconds
from parts.command_line import say
from parts.folders import temporary_folder
from parts.records import cores
from pytorch.contenders import Contender
from pytorch.ways import MOEJAX


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """Everyone once per round: the first, which compiles, and the median of the others.

    The total is the time of all rounds, compilation included. A contender that raises, such as one
    whose compiler does not work, leaves its reason and takes no further part.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    before = processor_seconds()
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            if name in failed:
                continue
            began = time.perf_counter()
            try:
                run()
            except (RuntimeError, OSError, AttributeError) as error:  # the last in an older PyTorch
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                say(f"  {name} failed, {failed[name]}")
                continue
            seconds[name].append(time.perf_counter() - began)
    timed = {name: times for name, times in seconds.items() if name not in failed}
    return {
        "rounds": rounds,
        "busy_elsewhere": busy_elsewhere(before, processor_seconds()),
        "first": {name: times[0] for name, times in timed.items()},
        "median": {name: float(np.median(times[1:])) for name, times in timed.items()},
        "total": {name: sum(times) for name, times in timed.items()},
        "failed": failed,
    }


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """How much faster moejax is than the best of the others."""
    others = {name: time for name, time in record["median"].items() if name != MOEJAX}
    best = min(others, key=lambda name: others[name])
    total = min(time for name, time in record["total"].items() if name != MOEJAX)
    return record | {
        "best_pytorch": best,
        "speedup": others[best] / record["median"][MOEJAX],
        "speedup_with_compilation": total / record["total"][MOEJAX],
    }


def same_threads() -> int:
    """Gives PyTorch as many threads as XLA takes: one per core that this process may use."""
    torch.set_num_threads(cores())
    return torch.get_num_threads()


@contextmanager
def no_inductor_cache() -> Iterator[None]:
    """Lets torch.compile find nothing from an earlier run."""
    with (
        temporary_folder() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield


def profile(run: Contender, largest: int = 12) -> dict[str, float]:
    """Where the time of a call goes: the largest shares of XLA's time, by operation."""
    with temporary_folder() as folder:
        with jax.profiler.trace(folder):
            run()
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        spent = operation_times(jax.profiler.ProfileData.from_file(path))
    total = sum(spent.values())
    return {name: time / total for name, time in spent.most_common(largest)}


def operation_times(data: jax.profiler.ProfileData) -> Counter[str]:
    """Nanoseconds by HLO operation, summed over the threads of XLA's pool."""
    spent: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                # A loop's time is the time of the operations in it, which are events too.
                if "hlo_op" in dict(event.stats) and not event.name.startswith("while"):
                    spent[event.name] += event.duration_ns
    return spent
