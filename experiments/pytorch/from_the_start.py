"""How long a user waits: whole processes, from their start to the first result and to the last."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.other_processes import busy_elsewhere, processor_seconds
from parts.ending import EndedError, before_the_end
from parts.folders import temporary_folder
from parts.progress import progress
from pytorch.twins import Problem
from pytorch.ways import BATCH_SIZE, MOEJAX, ways

EXPERIMENTS = Path(__file__).parent.parent
EPOCHS = 5
STEPS = 100  # of an epoch of the toy


def kept(name: str) -> str:
    """The name of a script that finds the programs it compiled before."""
    return f"{name}, programs kept"


def scripts(name: str, folder: str, without: set[str]) -> dict[str, list[str]]:
    """The scripts that take part; one that finds programs kept follows the one that keeps them."""
    given = [folder, str(EPOCHS), str(BATCH_SIZE.get(name, STEPS))]
    found: dict[str, list[str]] = {}
    for label, way in ways(name).items():
        if label not in without:
            how = "compiled" if way.compiled else "eager"
            found[label] = ["pytorch.script_in_torch", *given, way.study, way.batches, how]
            if way.compiled:
                found[kept(label)] = found[label]
    ours = ["pytorch.script_in_moejax", *given, name]
    return found | {MOEJAX: ours, kept(MOEJAX): ours}


def waits(name: str, problem: Problem, rounds: int, without: set[str]) -> dict[str, Any]:
    """Every script once per round, in turns.

    Args:
        name: of the study.
        problem: its data.
        rounds: how many.
        without: contenders that are known not to work here.

    Returns:
        The medians of seconds to the ``first`` line and to the end of the ``whole`` process, by
        script; and how busy other processes were.
    """
    before = processor_seconds()
    with temporary_folder() as folder:
        commands = scripts(name, folder, without)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in commands}
        np.save(Path(folder, "x.npy"), problem.x)
        np.save(Path(folder, "y.npy"), problem.y)
        for number in progress(range(rounds), f"processes of {name}"):
            for way, command in commands.items():
                programs = Path(folder, "programs", str(number))  # for this round only
                seconds[way].append(wait(command, programs))
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


def wait(command: list[str], programs: Path) -> tuple[float, float]:
    """Runs a script on as many threads as this process has; seconds to its first line and its end.

    Raises:
        EndedError: if it fails.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXPERIMENTS), *sys.path]),
        "MOEJAX_CACHE_DIR": str(programs),
        "TORCHINDUCTOR_CACHE_DIR": str(programs / "torch"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    script = [sys.executable, "-m", *command]
    with (
        subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True) as process,
        before_the_end(process.kill),
    ):
        line = process.stdout.readline() if process.stdout else ""
        first = time.perf_counter() - began
        process.communicate()
    if process.returncode or not line:
        raise EndedError(f"{' '.join(command)} ended with {process.returncode}")
    return first, time.perf_counter() - began
