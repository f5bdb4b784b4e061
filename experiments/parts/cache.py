"""Compiled programs, kept between runs in the user's cache folder.

A folder belongs to one processor and one version of JAX, so that no other ever reads it. JAX
notices damage to a program only as far as its compression does; so each has its SHA-256 beside it,
and one that does not match, or that a killed run left behind, is deleted and compiled again.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import platform
import warnings
from importlib import metadata
from pathlib import Path

SUFFIX = "-cache"  # of JAX's files


def keep_programs(wanted: bool) -> None:
    """Turns the cache on, or off.

    JAX_COMPILATION_CACHE_DIR names another folder, which is JAX's alone.

    Args:
        wanted: whether programs are kept.
    """
    import jax

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    if not wanted or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    folder = programs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a cache that cannot be written costs time and nothing else
    ignore_complaints()
    drop_damaged(folder)
    atexit.register(sign_programs)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_raise_persistent_cache_errors", False)


def ignore_complaints() -> None:
    """Passes over JAX's warnings of programs that it can neither read nor write: it compiles."""
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )


def sign_programs() -> None:
    """Signs what has been compiled so far, so that a run that is killed later keeps it."""
    import jax

    folder = programs_folder()
    if jax.config.jax_compilation_cache_dir == str(folder):  # type: ignore[attr-defined]
        sign(folder)


def programs_folder() -> Path:
    """Where the programs for this processor and this version of JAX are."""
    from data.cache import cache_dir

    names = [platform.machine(), processor_features()]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    versions = "-".join(metadata.version(package) for package in ("jax", "jaxlib"))
    return cache_dir() / "programs" / f"{versions}-{digest}"


def processor_features() -> str:
    """What a program may have been compiled for: the processor's name and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def drop_damaged(folder: Path) -> None:
    """Deletes every program that is not what its SHA-256 says, or has none."""
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if not signature(path).exists() or signature(path).read_text() != digest(path):
                path.unlink()
                signature(path).unlink(missing_ok=True)


def sign(folder: Path) -> None:
    """Puts the SHA-256 beside every program that has none."""
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if not signature(path).exists():
                signature(path).write_text(digest(path))


def signature(path: Path) -> Path:
    """Where the SHA-256 of a program stands."""
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
