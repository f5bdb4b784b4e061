"""One run: steps, evaluations, and a checkpoint after each, from which a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from language.training import Windows
from moejax import checkpoint
from moejax.training import TrainState
from parts.command_line import say
from parts.ending import EndedError, RefusedError, refusals
from parts.records import check_same_run, rounded, versions, write_lines
from parts.resume import note_other_versions

KEEP = 2  # checkpoints
SHAPING = [
    f"--{name}" for name in "width layers heads context hidden experts top-k".split()
]  # options that shape the network
LINE = (
    "{name:<12} {seed:>4} {step:>7,} {train_loss:>11.4f} {validation_loss:>16.4f} {seconds:>9.1f}"
)
HEADER = "model        seed    step  train loss  validation loss   seconds"


class Programs(NamedTuple):
    """What was compiled for a network; every seed uses it.

    Attributes:
        begin: ``seed -> state``.
        advance: ``(state, text, stop) -> (state, mean training loss)``.
        evaluate: ``(params, windows) -> results``.
    """

    begin: Callable[[int], TrainState]
    advance: Callable[..., tuple[TrainState, jax.Array]]
    evaluate: Callable[[Any, Windows], dict[str, jax.Array]]


class Run(NamedTuple):
    """A finished run.

    Attributes:
        history: a record per evaluation: step, seconds of training, losses.
        results: of the last evaluation.
        params: of the last step.
    """

    history: list[dict[str, Any]]
    results: dict[str, Any]
    params: Any


class Plan(NamedTuple):
    """What a run is.

    Attributes:
        name: of the model.
        seed: from which everything random follows.
        folder: for its checkpoints.
        steps: how many it takes.
        every: steps between evaluations.
        identity: what has to stay the same for a resumed run to be the same run.
    """

    name: str
    seed: int
    folder: Path
    steps: int
    every: int
    identity: dict[str, Any]


def train(
    plan: Plan,
    programs: Programs,
    text: jax.Array,
    windows: Windows,
    tick: Callable[[int], None],
) -> Run:
    """Takes the steps that are left, with a line and a checkpoint per evaluation."""
    state, history = restored(plan, programs.begin(plan.seed))
    tick(int(state.step))
    results = None
    with checkpoint.writer(plan.folder, keep=KEEP) as save:
        while int(state.step) < plan.steps:
            before = int(state.step)
            stop = min(plan.steps, (before // plan.every + 1) * plan.every)
            began = time.perf_counter()
            state, loss = jax.block_until_ready(programs.advance(state, text, np.int32(stop)))
            seconds = time.perf_counter() - began
            results = programs.evaluate(state.params, windows)
            check_finite(plan, stop, loss, results["loss"])
            history = [*history, record(plan, history, stop, loss, results, seconds)]
            config = {"identity": plan.identity, "history": history, "versions": versions()}
            save(state, step=stop, config=config)
            tick(stop - before)
            say(LINE.format(name=plan.name, seed=plan.seed, **history[-1]))
    if results is None:  # resumed when all was done
        results = programs.evaluate(state.params, windows)
    write_lines(plan.folder.parent / "metrics.jsonl", history)
    return Run(history, jax.device_get(results), state.params)


def check_finite(plan: Plan, step: int, *losses: jax.Array) -> None:
    """Ends the program if training has diverged.

    Raises:
        EndedError: naming the run.
    """
    if not all(map(np.isfinite, losses)):
        raise EndedError(
            f"the loss of {plan.name}, seed {plan.seed}, is not finite by step {step}: try a "
            "smaller --learning-rate"
        )


def record(
    plan: Plan,
    history: list[dict[str, Any]],
    step: int,
    loss: jax.Array,
    results: dict[str, jax.Array],
    seconds: float,
) -> dict[str, Any]:
    """A line of the history; its seconds count training only, from the first step on."""
    before = history[-1]["seconds"] if history else 0.0
    one = {
        "step": step,
        "train_loss": loss,
        "validation_loss": results["loss"],
        "seconds": before + seconds,
    }
    router = {name: results[name] for name in ("load", "dead_experts") if name in results}
    return rounded(one | router)


def check_same(plan: Plan) -> None:
    """Refuses to go on where another run has left checkpoints."""
    if checkpoint.latest(plan.folder) is not None:
        with refusals():
            saved = checkpoint.read_config(plan.folder)
        check_same_run(plan.identity, saved["identity"])


def note_nothing_to_resume(plans: list[Plan], out: Path) -> None:
    """Says so where no run has left a checkpoint."""
    if all(checkpoint.latest(plan.folder) is None for plan in plans):
        say(f"nothing to resume in {out}: starting from the beginning")


def restored(plan: Plan, fresh: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
    """The newest checkpoint of the same run, or its beginning."""
    if checkpoint.latest(plan.folder) is None:
        return fresh, []
    with refusals():
        found = checkpoint.restore(plan.folder, fresh)
    note_other_versions(found.config)
    say(f"{plan.name}, seed {plan.seed}: resumed after step {found.step:,}")
    return found.state, found.config["history"]


def trained(plan: Plan, like: TrainState) -> Any:
    """The params in the newest checkpoint of a run, if it had the network of the plan.

    The sizes of the params alone do not tell: they do not depend on the number of heads.
    """
    try:
        saved = checkpoint.read_config(plan.folder)["identity"]
        check_same_run(*({name: each[name] for name in SHAPING} for each in (plan.identity, saved)))
        return checkpoint.restore(plan.folder, like).state.params
    except ValueError as error:
        raise RefusedError(f"{error} Train {plan.name} first, with these sizes.") from error
