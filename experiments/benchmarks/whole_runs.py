"""The benchmark's whole runs: seeds of the toy, epochs of MNIST, and the wait before the first."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import data
import mnist
import toy
from benchmarks.timing import Contender, Result, jax_contender, measure
from moejax.training import (
    Masked,
    empty_metrics,
    epoch_order,
    init_state,
    train_step,
    train_until,
)
from parts.ending import EndedError, before_the_end
from parts.folders import temporary_folder
from parts.models import DIGITS, MODELS, PIXELS, mlp_expert

SCRIPT = Path(mnist.__file__)
SEEDS = 100
BATCH, EXPERTS, TOP_K = 128, 8, 2
STAGES = {  # what mnist.py prints, and what has happened by then
    "images to train": "imports and data",
    "train loss": "first compilation",
    "    1 ": "first epoch",
    "are in": "pictures",
}


def toy_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """The toy for one seed and for many at once, per seed."""
    steps, count = (20, 100) if quick else (500, 1000)
    points = data.toy(jax.random.key(0), count)
    fit = partial(toy.fit, toy.cooperating(2), points, steps)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    contenders = [
        jax_contender("one seed", fit, (keys[0],)),
        jax_contender(f"one of {SEEDS} seeds", jax.vmap(fit), (keys,), runs=SEEDS),
    ]
    sizes = {"points": count, "steps": steps}
    yield Result("toy", sizes, measure(contenders, rounds), {})


def mnist_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """An epoch of the MNIST experiment on random images."""
    images, hidden = (1000, 16) if quick else (60000, 128)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 28, 28), np.uint8)
    labels = rng.integers(0, DIGITS, images).astype(np.int32)
    split = jax.device_put(data.Split(pixels, labels))
    active = {"dense": 1, "soft": EXPERTS, "sparse": TOP_K}
    contenders = [epoch_contender(name, split, hidden, experts) for name, experts in active.items()]
    sizes = {"images": images, "hidden": hidden, "E": EXPERTS, "K": TOP_K, "batch": BATCH}
    yield Result("mnist", sizes, measure(contenders, min(rounds, 5)), {})


def epoch_contender(name: str, split: data.Split, hidden: int, active: int) -> Contender:
    """One epoch from the first state, as mnist.py runs it."""
    model = MODELS[name](mlp_expert(hidden), EXPERTS, TOP_K, None)
    optimizer = optax.adam(1e-3)
    step = train_step(partial(mnist.masked_objective, model), optimizer)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer, jax.random.key(1))
    masked = Masked(split, jnp.ones(len(split.labels), bool))
    metrics = empty_metrics(step, state, masked, batch_size=BATCH)
    order = epoch_order(state, 0, len(split.labels))
    args = (state, metrics, masked, order, np.int32(len(metrics["loss"])))
    # Forward, the kernels' gradients, and the input's gradient in the second layer only.
    expert = 2 * hidden * (2 * PIXELS + 3 * DIGITS)
    router = 0 if name == "dense" else 4 * PIXELS * EXPERTS
    flops = len(split.labels) * (active * expert + router)
    return jax_contender(name, partial(train_until, step, batch_size=BATCH), args, flops=flops)


def load_suite(rounds: int, quick: bool) -> Iterator[Result]:
    """How long mnist.py takes to its first epoch, and to its pictures, with nothing compiled."""
    arguments = ["--dataset", "digits", "--hidden", "16"] if quick else []
    runs = [stages(["--epochs", "1", *arguments]) for _ in range(min(rounds, 3))]
    began = time.perf_counter()
    loaded = data.digits() if quick else data.load()
    spent = {"the data alone": time.perf_counter() - began}
    for name in runs[0]:
        spent[name] = statistics.median(run[name] for run in runs)
    spent["until the first epoch line"] = sum(
        spent[name] for name in ("imports and data", "first compilation", "first epoch")
    )
    records = [_timed(name, seconds) for name, seconds in spent.items()]
    yield Result("load", {"data": loaded.name, "runs": len(runs)}, records, {})


def stages(arguments: list[str]) -> dict[str, float]:
    """Runs mnist.py and times what it prints.

    Raises:
        EndedError: if it fails.
    """
    spent = {}
    with temporary_folder() as out:
        before = time.perf_counter()
        command = [sys.executable, str(SCRIPT), "--no-cache", "--out", out, *arguments]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run,
            before_the_end(run.kill),
        ):
            waiting = list(STAGES)
            for line in run.stdout or ():
                if waiting and waiting[0] in line:
                    now = time.perf_counter()
                    spent[STAGES[waiting.pop(0)]], before = now - before, now
    if run.returncode or waiting:
        raise EndedError(f"{' '.join(command)} ended with {run.returncode}, without {waiting}")
    return spent


def _timed(name: str, seconds: float) -> dict[str, Any]:
    """A record of something that has no limit."""
    return {"contender": name, "mode": "", "seconds": seconds}
