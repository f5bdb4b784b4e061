"""Speed of the same training in both frameworks: in turns, in one process, on as many threads."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.other_processes import busy_elsewhere, processor_seconds
from moejax.interop import torch as conversion
from moejax.interop.torch import StateDict
from moejax.training import Step, TrainState, init_state, train_epoch, train_step
from parts.command_line import say
from pytorch.batches import Batches, indexed, loaded, repeated
from pytorch.recipes import Study
from pytorch.training import with_weights
from pytorch.twins import Problem, Twin, objective

MOEJAX = "moejax"
Contender = Callable[[], Any]  # one epoch, or one run of the toy


def toy_contenders(
    study: Study, twin: Twin, state_dict: StateDict, problem: Problem
) -> dict[str, Contender]:
    """Full-batch steps: a loop in PyTorch, as it is and compiled, against one scan."""
    x, y, order = problem
    repeat = repeated(torch.from_numpy(x), torch.from_numpy(y), len(order))
    contenders = {"PyTorch": torch_contender(study, state_dict, repeat)}
    if compiler():
        contenders["PyTorch, torch.compile"] = torch_contender(
            study, state_dict, repeat, torch.compile
        )
    on_device = jnp.asarray(x), jnp.asarray(y)

    def scan(step: Step, state: TrainState) -> tuple[TrainState, Any]:
        return jax.lax.scan(lambda state, _: step(state, on_device), state, length=len(order))

    return contenders | {MOEJAX: moejax_contender(twin, state_dict, scan)}


def epoch_contenders(
    study: Study, twin: Twin, state_dict: StateDict, problem: Problem, batch_size: int
) -> dict[str, Contender]:
    """An epoch of shuffled batches: PyTorch three ways, and one scan."""
    x, y, _ = problem
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    shuffled = indexed(inputs, labels, batch_size)
    by_loader = loaded(inputs, labels, batch_size)
    contenders = {
        "PyTorch, DataLoader": torch_contender(study, state_dict, by_loader),
        "PyTorch, indexing": torch_contender(study, state_dict, shuffled),
    }
    if compiler():
        contenders["PyTorch, torch.compile"] = torch_contender(
            study, state_dict, shuffled, torch.compile
        )
    run = partial(train_epoch, data=(jnp.asarray(x), jnp.asarray(y)), batch_size=batch_size)
    return contenders | {MOEJAX: moejax_contender(twin, state_dict, run)}


def torch_contender(
    study: Study,
    state_dict: StateDict,
    batches: Batches,
    transform: Callable[..., Any] = lambda model: model,
) -> Contender:
    """The usual loop; weights and optimizer go on from call to call."""
    model = with_weights(study, state_dict, torch.float32)
    optimizer = study.optimizer(model.parameters())
    predict = transform(model)

    def run() -> None:
        for x, y in batches():
            optimizer.zero_grad()
            study.loss(predict(x), y).backward()
            optimizer.step()

    return run


def moejax_contender(twin: Twin, state_dict: StateDict, advance: Callable[..., Any]) -> Contender:
    """One jitted call; the state goes on from call to call."""
    params = jax.tree.map(jnp.asarray, conversion.from_torch(twin.layout, state_dict))
    step = train_step(partial(objective, twin), twin.optimizer)
    program = jax.jit(partial(advance, step), donate_argnums=0)
    state = init_state(params, twin.optimizer, jax.random.key(0))

    def run() -> TrainState:
        nonlocal state
        state, _ = jax.block_until_ready(program(state))
        return state

    return run


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """Everyone once per round: the first, which compiles, and the median of the others.

    The total is the time of all rounds, compilation included. A contender that raises, such as a
    compiler that does not work, leaves its reason and takes no further part.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    before = processor_seconds()
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            if name in failed:
                continue
            began = time.perf_counter()
            try:
                run()
            except (RuntimeError, OSError) as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                say(f"  {name} failed, {failed[name]}")
                continue
            seconds[name].append(time.perf_counter() - began)
    timed = {name: times for name, times in seconds.items() if name not in failed}
    return {
        "rounds": rounds,
        "busy_elsewhere": busy_elsewhere(before, processor_seconds()),
        "first": {name: times[0] for name, times in timed.items()},
        "median": {name: float(np.median(times[1:])) for name, times in timed.items()},
        "total": {name: sum(times) for name, times in timed.items()},
        "failed": failed,
    }


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """How much faster moejax is than the best of the others."""
    others = {name: time for name, time in record["median"].items() if name != MOEJAX}
    best = min(others, key=lambda name: others[name])
    total = min(time for name, time in record["total"].items() if name != MOEJAX)
    return record | {
        "best_pytorch": best,
        "speedup": others[best] / record["median"][MOEJAX],
        "speedup_with_compilation": total / record["total"][MOEJAX],
    }


def same_threads() -> int:
    """Gives PyTorch as many threads as XLA takes: one per core that this process may use."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    return torch.get_num_threads()


@contextmanager
def no_inductor_cache() -> Iterator[None]:
    """Lets torch.compile find nothing from an earlier run."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, if there is one."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def profile(run: Contender, largest: int = 12) -> dict[str, float]:
    """Where the time of a call goes: the largest shares of XLA's time, by operation."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        spent = operation_times(jax.profiler.ProfileData.from_file(path))
    total = sum(spent.values())
    return {name: time / total for name, time in spent.most_common(largest)}


def operation_times(data: jax.profiler.ProfileData) -> Counter[str]:
    """Nanoseconds by HLO operation, summed over the threads of XLA's pool."""
    spent: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                # The time of a loop is that of the operations in it, which are events too.
                if "hlo_op" in dict(event.stats) and not event.name.startswith("while"):
                    spent[event.name] += event.duration_ns
    return spent
