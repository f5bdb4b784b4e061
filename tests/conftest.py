"""Strict mode: several devices, no silent promotion of dtypes or ranks, warnings are errors."""

import gc
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Small programs, each run a few times: compiling them fast saves more than it costs. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment they are compiled as users compile them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and metadata.version("jaxlib") < "0.11":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# In one part instead of 32, each of which would begin with a compiler of its own.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest

import settings

settings.save_time()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Keeps compiled programs between runs, beside pytest's own cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_sessionfinish():
    """Looks for cycles once; pytest and Python would do so six times, among millions of objects."""
    jax.clear_caches()  # or they would be searched, and then emptied all the same
    gc.collect()
    gc.freeze()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def optimized():
    """Programs that take longer to compile and less to run, for a test that runs one for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's usual promotion, for code that calls libraries which rely on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def empty_pictures(monkeypatch):
    """Pictures are made and not drawn, where a test looks at most for their names."""
    empty = lambda picture, path: path.touch()  # noqa: E731
    # In this order, because the first imports from the second.
    for module in ("parts.reports", "parts.output"):
        monkeypatch.setattr(f"{module}.save_figure", empty)
    monkeypatch.setattr("moejax.plot.save_animation", empty)
