"""What a run writes about itself: its numbers, its versions, and what makes it the same run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moejax
from data import Dataset
from parts.ending import RefusedError
from parts.output import save_text


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record; what stood there before is replaced only once the new one is complete."""
    save_text(json.dumps(record, indent=2) + "\n", path)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one record per line; what stood there before is replaced once all are written."""
    save_text("".join(json.dumps(record) + "\n" for record in records), path)


def rounded(value: Any) -> Any:
    """Arrays as plain numbers and lists, with six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    numbers = np.asarray(value).tolist()
    if isinstance(numbers, list):
        return [rounded(number) for number in numbers]
    return float(f"{numbers:.6g}") if isinstance(numbers, float) else numbers


def check_same_run(now: dict[str, Any], was: dict[str, Any]) -> None:
    """Refuses to go on with a run that had other settings.

    Raises:
        RefusedError: naming the first setting that differs.
    """
    for name in now | was:
        if now.get(name) != was.get(name):
            raise RefusedError(
                f"{name} must be what the run began with, {was.get(name)}; got {now.get(name)}"
            )


def data_identity(data: Dataset) -> dict[str, str]:
    """What tells runs on different data apart: a digest of all images and labels."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((data.train, data.test)):
        digest.update(np.asarray(leaf).tobytes())
    return {"the data": f"{data.name} {digest.hexdigest()[:16]}"}


def versions() -> dict[str, str]:
    """What a result depends on besides the arguments."""
    found = {"moejax": moejax.__version__, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # not every run needs flax
            found[package] = metadata.version(package)
    return found | {
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "cores": str(cores()),
        "processor": processor(),
    }


def cores() -> int:
    """How many cores this process may use; XLA takes a thread for each."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
