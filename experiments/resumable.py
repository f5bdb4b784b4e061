"""Runs that survive: saved between steps, stopped politely, resumed where they were.

A run's random numbers are functions of its key and the step, and every number of steps runs the
same compiled program; so a resumed run takes the same steps, bit by bit, as one never interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from common import at_least, say

from moejax import checkpoint
from moejax.checkpoint.manifest import versions
from moejax.datasets import Dataset
from moejax.training import Metrics, TrainState

KEEP = 3  # checkpoints
PATIENCE = 25  # most steps between two looks at whether a signal has come
NEWEST = -1
FREE_TO_DIFFER = ("out", "resume", "epochs", "checkpoint_every", "inspect")


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


class Stopped(Exception):
    """A signal has ended the run; it is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"{signal.Signals(signum).name} after step {step}, which is saved; to go on, repeat the "
            "command with --resume"
        )
        self.signum = signum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run that can be resumed."""
    parser.add_argument(
        "--checkpoint-every", type=at_least(1), metavar="N", help="save a checkpoint every N steps"
    )
    parser.add_argument(
        "--resume",
        type=at_least(0),
        nargs="?",
        const=NEWEST,
        metavar="STEP",
        help="go on from the newest checkpoint in --out, or from that of STEP",
    )


def begin(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    folder: Path,
    fresh: Progress,
    data: Dataset,
) -> Progress:
    """Where the run starts: afresh, or from a checkpoint; with room for those to come."""
    newest = checkpoint.latest(folder)
    if args.resume is None and newest is not None:
        parser.error(
            f"{folder} holds checkpoints of an earlier run (step {newest}); pass --resume to go on "
            "with it, or choose another --out"
        )
    if args.resume is None and args.checkpoint_every is None:
        return fresh
    progress = fresh
    if newest is not None:
        progress = restored(parser, args, folder, fresh, data)
    elif args.resume is not None:
        say(f"nothing to resume in {folder}: starting from the beginning")
    try:
        if newest is None:  # also shows that the folder can be written
            save(progress, args, data, lambda *a, **k: checkpoint.save(folder, *a, keep=KEEP, **k))
        check_room(folder, progress)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return progress


def restored(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    folder: Path,
    fresh: Progress,
    data: Dataset,
) -> Progress:
    """The progress that a checkpoint holds, of a run with the same arguments and data."""
    like = {"state": fresh.state, "metrics": fresh.metrics}
    config = saved_config(parser, args, folder)
    check_arguments(parser, args, config["arguments"], arguments(args, data))
    try:
        step = None if args.resume == NEWEST else args.resume
        found = checkpoint.restore(folder, like, step=step)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error} Choose one with --resume STEP.\n")
    ...
