"""What the experiments share: their command line, their output folder and their records."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import jax
import numpy as np

import moejax
from parts.cache import sign_programs
from parts.ending import EndedError, RefusedError
from parts.output import save_text

LARGEST_SEED = 2**32 - 1  # a larger one would be cut, and be the seed of another run


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that answers bad arguments with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(minimum: int, at_most: int | None = None) -> Callable[[str], int]:
    """An argparse type: integers from ``minimum`` on."""
    limits = f"of at least {minimum}" if at_most is None else f"from {minimum} to {at_most}"

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"-?[0-9]{1,4000}", text) else None
        if number is None or number < minimum or number > (at_most or number):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text[:80]}")
        return number

    return parse


def folder_name(text: str) -> Path:
    """An argparse type: a folder on this machine, given with ``file:``, ``~`` or neither."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    address = urlsplit(text)
    if address.scheme == "file" and address.netloc in ("", "localhost"):
        return Path(unquote(address.path))
    if "://" in text:
        raise argparse.ArgumentTypeError(f"must be a folder on this machine, got {text}")
    return Path(text).expanduser()


def positive_float(text: str) -> float:
    """An argparse type: finite numbers above zero."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above zero, got {text}")
    return value


def add_out(parser: argparse.ArgumentParser, out: str) -> None:
    """The folder that a command writes to."""
    parser.add_argument(
        "--out",
        type=folder_name,
        default=Path(out),
        metavar="FOLDER",
        help="where pictures and numbers are written (default: %(default)s)",
    )


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that every experiment has."""
    add_out(parser, out)
    parser.add_argument(
        "--seed",
        type=at_least(0, LARGEST_SEED),
        default=0,
        help="another seed gives another run, the same seed the same (default: %(default)s)",
    )
    add_no_cache(parser)


def add_no_cache(parser: argparse.ArgumentParser) -> None:
    """The option of a command that keeps what it compiles."""
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compile everything, instead of keeping compiled programs in the cache folder",
    )


def start_devices() -> None:
    """Finds the devices before anything else takes time.

    Raises:
        EndedError: if JAX has none of the kind that the environment asks for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where no platform is left
        first, *_ = *str(error).splitlines(), "JAX found no device"
        raise EndedError(f"{first} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')})") from None


def check_memory(needed: int, options: str) -> None:
    """Refuses a run that the machine could not hold.

    Args:
        needed: bytes, at the least.
        options: which options to choose smaller.

    Raises:
        RefusedError: with what it would take, and what there is.
    """
    there = machine_memory()
    if there is not None and needed > there:
        raise RefusedError(
            f"this run would take {in_words(needed)} of memory, and this machine has "
            f"{in_words(there)}: choose a smaller {options}"
        )


def machine_memory() -> int | None:
    """The bytes of memory that the machine has, as far as the system tells."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def in_words(size: int) -> str:
    """A number of bytes as a person writes it."""
    power = min(max(len(str(size)) - 1, 0) // 3, 5)
    return f"{size / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record; what stood there before is replaced only once the new one is complete."""
    save_text(json.dumps(record, indent=2) + "\n", path)


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


# For what runs once: it takes less time to compile than it can save. JAX 0.11 has no such choice.
QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The function compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    sign_programs()
    return program, seconds


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
        sign_programs()
        return list(programs), max(ends) - began

    return wait


def say(text: str = "") -> None:
    """Prints at once, also into a pipe; a reader that has gone away stops no training."""
    try:
        print(text, flush=True, file=sys.stdout)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open to the end
