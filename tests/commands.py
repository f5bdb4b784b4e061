"""Runs an experiment's script in this process, as `python experiments/NAME.py ARGUMENTS` would."""

import gc
import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


# The tests' own way to compile, and devices as users have them.
FLAGS = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(FLAGS)}


@contextmanager
def process_given_back():
    """Restores the signal handlers and the garbage collector's thresholds, which a script sets."""
    thresholds = gc.get_threshold()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        signal.set_wakeup_fd(-1)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(name, *arguments):
    script = str(EXPERIMENTS / f"{name}.py")
    path = [str(EXPERIMENTS), *sys.path]
    argv = mock.patch.object(sys, "argv", [script, *arguments])
    with process_given_back(), argv, mock.patch.object(sys, "path", path):
        return runpy.run_path(script, run_name="__main__")


def refusal(name, *arguments, capsys, code=2):
    """The one line with which the script refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        run(name, *arguments)
    assert ended.value.code == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def start_process(name, *arguments, **environment):
    """Starts the script in a process of its own."""
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | ONE_DEVICE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
