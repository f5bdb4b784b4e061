"""Programs that are compiled before they are needed, and the seconds that takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from parts.cache import sign_programs

T = TypeVar("T")

# For programs that run for a moment, above all those that draw first parameters: compiling them for
# longer would not pay. From JAX 0.11 on there is one way to fuse.
QUICK_TO_COMPILE: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK_TO_COMPILE["xla_cpu_use_fusion_emitters"] = False

# For programs of small sums on CPU: XLA's own code for them. jaxlib 0.10.2 to 0.12 hands sums over
# the last axis, as in a softmax over a few values, to YNNPACK, which takes several times as long.
OWN_REDUCTIONS: dict[str, str] = {}
if jax.__version_info__ < (0, 13):
    OWN_REDUCTIONS["xla_cpu_experimental_ynn_fusion_type"] = ""


def compiled(
    function: Callable[..., Any], *args: Any, **options: Any
) -> tuple[jax.stages.Compiled, float]:
    """The function compiled for these arguments, with options of `jax.jit`; the seconds it took."""
    start = time.perf_counter()
    program = jax.jit(function, **options).lower(*args).compile()
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
    # Tracing holds the interpreter's lock and needs this thread's settings; compiling does neither.
    coming = [pool.submit(finish, function.lower(*args)) for function, args in jobs]
    pool.shutdown(wait=False)

    def wait() -> tuple[list[jax.stages.Compiled], float]:
        programs, ends = zip(*(one.result() for one in coming), strict=True)
        sign_programs()
        return list(programs), max(ends) - began

    return wait


def timed(program: Callable[..., T], *work: Callable[[], object]) -> Callable[..., tuple[T, float]]:
    """A compiled program that waits for its results, and measures how long they take.

    Args:
        program: the program.
        work: what Python does while the device computes, one thing in each of the first calls; its
            time does not count.

    Returns:
        A function of the program's arguments: its results, and seconds.
    """
    left = list(work)

    def call(*args: Any) -> tuple[T, float]:
        began = time.perf_counter()
        results = program(*args)  # comes back at once

        def wait() -> float:
            jax.block_until_ready(results)
            return time.perf_counter() - began

        with ThreadPoolExecutor(1) as pool:
            seconds = pool.submit(wait)
            if left:
                left.pop(0)()
            return results, seconds.result()

    return call
