"""Settings of JAX and Python under which small programs take less time to trace and to compile."""

import functools
import gc

import jax
from jax._src.interpreters import mlir


def save_time():
    """Spends less time on what no test looks at."""
    # Tracing makes many objects and few cycles, so the collector looks for cycles rarely.
    gc.set_threshold(200_000, 100, 1000)
    # No test reads which line of Python an instruction comes from.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # JAX makes a context of MLIR for every program, a quarter of the time of a small one.
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
