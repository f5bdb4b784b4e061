"""Runs that survive: saved between steps, stopped politely, resumed where they were.

Random numbers are functions of the run's key and the step, and one compiled program takes any
number of steps; so a resumed run takes the same steps, bit by bit, as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from data import Dataset
from moejax import checkpoint
from moejax.training import Metrics, TrainState
from parts.command_line import at_least, in_words, say
from parts.ending import EndedError, RefusedError, end_at_once, signals
from parts.folders import check_named_in_utf8
from parts.records import check_same_run, data_identity, versions, write_lines

KEEP = 3  # checkpoints
PATIENCE = 25  # the most steps between two looks at whether a signal has come
NEWEST = -1
FREE_TO_DIFFER = {"out", "resume", "epochs", "checkpoint_every", "inspect", "no_cache"} | {
    "data_dir",  # the images themselves are compared
    "mesh",
    "coordinator",
    "processes",
    "process_id",
}

Save = Callable[..., None]
Pause = Callable[["Progress"], None]


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        state: of training.
        metrics: of every step of the epoch under way, zero for those to come.
        history: one record per finished epoch.
        seconds: spent on the epoch under way.
    """

    state: TrainState
    metrics: Metrics
    history: list[dict[str, Any]]
    seconds: float

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return int(self.state.step)


class StoppedError(EndedError):
    """A signal has ended the run, which is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"{signal.Signals(signum).name} after step {step}, which is saved: repeat the command "
            "with --resume to go on",
            code=128 + signum,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run that can be resumed."""
    add = parser.add_argument
    add(
        "--checkpoint-every",
        type=at_least(1),
        metavar="N",
        help="save every N steps, so that a run that is stopped can go on (default: never)",
    )
    add(
        "--resume",
        type=at_least(0),
        nargs="?",
        const=NEWEST,
        metavar="STEP",
        help="go on from the newest checkpoint in --out, or from the one of STEP (default: a new "
        "run)",
    )


class Plan(NamedTuple):
    """What is saved when, and where.

    Attributes:
        folder: of the checkpoints.
        every: steps between them; None saves none.
        epochs: after which the run ends.
        identity: what has to stay the same for a resumed run to be the same run.
    """

    folder: Path
    every: int | None
    epochs: int
    identity: dict[str, str]


def plan(args: argparse.Namespace, out: Path, data: Dataset, steps_per_epoch: int) -> Plan:
    """What the arguments ask for; a resumed run is saved once an epoch if they do not say."""
    every = args.checkpoint_every or (None if args.resume is None else steps_per_epoch)
    named = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in vars(args).items()
        if name not in FREE_TO_DIFFER
    }
    identity = named | (data_identity(data) if every else {})
    return Plan(out / "checkpoints", every, args.epochs, identity)


def check(plan: Plan, resume: int | None) -> None:
    """Refuses, before anything is trained, what `begin` could not go on with.

    Raises:
        RefusedError: if there are checkpoints of another run, or a damaged one, or none of the
            step that is asked for; or if the folder cannot hold any.
    """
    if plan.every is not None:
        check_named_in_utf8(plan.folder)
    if resume is None:
        check_fresh(plan.folder)
    elif checkpoint.latest(plan.folder) is not None:
        check_identity(plan, read(checkpoint.read_config, plan.folder, step=step_of(resume)))
    elif resume != NEWEST:
        raise RefusedError(f"--resume {resume}: there is no checkpoint in {plan.folder}")


def check_fresh(folder: Path) -> None:
    """Refuses to begin where an earlier run has left checkpoints."""
    newest = checkpoint.latest(folder)
    if newest is not None:
        raise RefusedError(
            f"{folder} holds checkpoints of an earlier run, up to step {newest}: go on with it by "
            "--resume, or choose another --out"
        )


def step_of(resume: int) -> int | None:
    """The step of a checkpoint to resume, or None for the newest."""
    return None if resume == NEWEST else resume


def begin(plan: Plan, resume: int | None, fresh: Progress) -> Progress:
    """Where the run starts: afresh, or from a checkpoint.

    Raises:
        RefusedError: if the checkpoint is damaged.
        OSError: if there is no room for the checkpoints to come.
    """
    if plan.every is None:
        return fresh
    check_room(plan, fresh)
    if resume is not None and checkpoint.latest(plan.folder) is not None:
        return restored(plan, step_of(resume), fresh)
    if resume is not None:
        say(f"nothing to resume in {plan.folder}: starting from the beginning")
    # Shows that checkpoints can be written, before anything is lost if not.
    save(plan, partial(checkpoint.save, plan.folder, keep=KEEP), fresh)
    return fresh


def agreed(signum: int | None) -> int | None:
    """The signal that any process of the run has had, so that all of them save at the same step."""
    if jax.process_count() == 1:
        return signum
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(signum or 0)))) or None


def restored(plan: Plan, step: int | None, fresh: Progress) -> Progress:
    """The progress in a checkpoint of the same run."""
    like = {"state": fresh.state, "metrics": fresh.metrics}
    found = read(checkpoint.restore, plan.folder, like, step=step)
    checkpoint.discard(plan.folder, after=found.step)
    note_other_versions(found.config)
    say(f"resumed after step {found.step}")
    return Progress(**found.state, history=found.config["history"], seconds=found.config["seconds"])


def note_other_versions(config: dict[str, Any]) -> None:
    """Says so where other versions or another machine wrote a checkpoint."""
    if config.get("versions") != versions():
        say(
            "other versions or another machine wrote the checkpoint: going on, but not bit by bit "
            "as it would have"
        )


def read(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Reads from a checkpoint, or says how to choose another one."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise RefusedError(f"{error} Choose another one by --resume STEP.") from error


def check_identity(plan: Plan, saved: dict[str, Any]) -> None:
    """Checks that a checkpoint is of the same run, which may only have become longer."""
    check_same_run(plan.identity, saved["identity"])
    if plan.epochs < saved["epochs"]:
        raise RefusedError(f"--epochs must be at least {saved['epochs']}, got {plan.epochs}")


def save(plan: Plan, write: Save, progress: Progress) -> None:
    """Saves everything that a run needs to go on."""
    state = {"state": progress.state, "metrics": progress.metrics}
    config = {
        "identity": plan.identity,
        "epochs": plan.epochs,
        "history": progress.history,
        "seconds": progress.seconds,
        "versions": versions(),
    }
    write(state, step=progress.step, config=config)


def check_room(plan: Plan, progress: Progress) -> None:
    """Checks that the disk can hold all the checkpoints that will be there at once."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((progress.state, progress.metrics)))
    there = list(plan.folder.iterdir()) if plan.folder.is_dir() else []
    complete = sum(path.name.isdecimal() for path in there)
    missing = KEEP + 1 - complete  # one more while it is being written
    free = shutil.disk_usage(plan.folder.parent).free
    if free < missing * size:
        raise OSError(
            f"{in_words(missing * size)} must be free in {plan.folder} for checkpoints, there are "
            f"{in_words(free)}"
        )


@contextmanager
def metrics_log(path: Path, history: list[dict[str, Any]]) -> Iterator[TextIO]:
    """Opens a file of one record per line, holding exactly the history."""
    write_lines(path, history)
    with open(path, "a") as log:
        yield log


def next_stop(plan: Plan, step: int, end: int) -> int:
    """The step to run to in one go: the end of the epoch, unless something may have to be saved."""
    if plan.every is None:
        return end
    return min(end, step + PATIENCE, (step // plan.every + 1) * plan.every)


@contextmanager
def pauses(plan: Plan) -> Iterator[Pause]:
    """What to do between steps: save if it is time, and stop if a signal has come."""
    if plan.every is None:
        yield lambda progress: None
        return
    every = plan.every
    with signals() as received:
        with checkpoint.writer(plan.folder, keep=KEEP) as write:

            def pause(progress: Progress) -> None:
                signum = agreed(received())
                if signum or progress.step % every == 0 or len(progress.history) == plan.epochs:
                    save(plan, write, progress)
                if signum:
                    raise StoppedError(signum, progress.step)

            yield pause
        if signum := received():  # it came while the writer finished its last checkpoint
            end_at_once(signum)
