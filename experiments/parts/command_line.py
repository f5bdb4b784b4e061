"""What the experiments share: their command line, their output folder and their records."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

import moejax


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that answers bad arguments with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: integers from ``minimum`` on."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {minimum}, got {text}"
            )
        return int(text)

    return parse


def positive_float(text: str) -> float:
    """An argparse type: finite numbers above zero."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above zero, got {text}")
    return value


def output_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """Makes the folder, and finds out now and not after training whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 2**20)
    except OSError as error:
        parser.error(f"cannot write to --out {folder}: {error.strerror}; choose another folder")
    return folder


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record; what stood there before is replaced only once the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)


def rounded(value: Any) -> Any:
    """Arrays as plain numbers and lists, with six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    numbers = np.asarray(value).tolist()
    if isinstance(numbers, list):
        return [rounded(number) for number in numbers]
    return float(f"{numbers:.6g}") if isinstance(numbers, float) else numbers


def versions() -> dict[str, str]:
    """What a result depends on besides the arguments."""
    packages = ["jax", "jaxlib", "flax", "optax", "numpy"]
    return {
        "moejax": moejax.__version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "cores": str(os.cpu_count()),
        "processor": processor(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def compiled(
    function: Callable[..., Any], *args: Any, out_shardings: Any = None
) -> tuple[Callable[..., Any], float]:
    """The function compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    program = jax.jit(function, out_shardings=out_shardings).lower(*args).compile()
    return program, time.perf_counter() - start


def compile_in_background(
    *jobs: tuple[jax.stages.Wrapped, tuple[Any, ...]],
) -> Callable[[], tuple[list[jax.stages.Compiled], float]]:
    """Compiles jitted functions for their arguments while the caller goes on.

    Returns:
        A function that waits for the programs; with them it returns the seconds they took.
    """
    began = time.perf_counter()

    def finish(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
        return lowered.compile(), time.perf_counter()

    pool = ThreadPoolExecutor(len(jobs))
    # Tracing holds the interpreter's lock and needs this thread's settings; XLA does neither.
    coming = [pool.submit(finish, function.lower(*args)) for function, args in jobs]
    pool.shutdown(wait=False)

    def wait() -> tuple[list[jax.stages.Compiled], float]:
        programs, ends = zip(*(one.result() for one in coming), strict=True)
        return list(programs), max(ends) - began

    return wait


def say(text: str = "") -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True, file=sys.stdout)
