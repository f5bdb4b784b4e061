"""How long a user waits: whole processes, from their start to the first result and to the last."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.other_processes import busy_elsewhere, processor_seconds
from parts.progress import progress
from pytorch.races import compiler
from pytorch.table import OURS
from pytorch.twins import Problem

EXPERIMENTS = Path(__file__).parent.parent
EPOCHS = 5


def commands(name: str) -> dict[str, list[str]]:
    """The scripts that take part, and what they are given before the data."""
    ways = ["indexing"] if name == "toy" else ["DataLoader", "indexing"]
    ways += ["torch.compile"] if compiler() else []
    theirs = {f"PyTorch, {way}": ["pytorch.script_in_torch", name, way] for way in ways}
    return theirs | {each: ["pytorch.script_in_moejax", name] for each in OURS}


def waits(name: str, problem: Problem, rounds: int) -> dict[str, Any]:
    """Every script once per round, in turns.

    Returns:
        The medians of seconds to the ``first`` line and to the end of the ``whole`` process, by
        script; and how busy other processes were.
    """
    scripts = commands(name)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in scripts}
    before = processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "x.npy"), problem.x)
        np.save(Path(folder, "y.npy"), problem.y)
        for number in progress(range(rounds), f"processes of {name}"):
            for way, script in scripts.items():
                # The programs of a round are kept for its second run, and for no other round.
                programs = Path(folder, "programs", str(number))
                seconds[way].append(wait([*script, folder, str(EPOCHS)], programs))
    medians = {
        way: [statistics.median(part) for part in zip(*times, strict=True)]
        for way, times in seconds.items()
    }
    return {
        "rounds": rounds,
        "busy_elsewhere": busy_elsewhere(before, processor_seconds()),
        "first": {way: first for way, (first, _) in medians.items()},
        "whole": {way: whole for way, (_, whole) in medians.items()},
    }


def wait(script: list[str], programs: Path) -> tuple[float, float]:
    """Runs a script; seconds to its first line, and to its end.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXPERIMENTS), *sys.path]),
        "MOEJAX_CACHE_DIR": str(programs),
        "TORCHINDUCTOR_CACHE_DIR": str(programs / "torch"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        first = next(iter(process.stdout or ()), "") and time.perf_counter() - began
        process.communicate()
    if process.returncode or not first:
        raise RuntimeError(f"{' '.join(script)} ended with {process.returncode}")
    return first, time.perf_counter() - began
