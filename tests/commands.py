"""Runs an experiment's script in this process, as `python experiments/NAME.py ARGUMENTS` would."""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import jax
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
    with (
        process_given_back(),
        argv,
        mock.patch.object(sys, "path", path),
        jax.numpy_dtype_promotion("standard"),  # as in a process of its own
        jax.numpy_rank_promotion("allow"),
    ):
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


@cache
def forks():
    """Makes processes by forking one that has imported everything and sees one device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    found = {"PYTHONPATH": os.pathsep.join(sys.path)}  # where it looks for what to import
    with mock.patch.dict(os.environ, ONE_DEVICE | found):
        forkserver.ensure_running()
    return context


def start_fork(name, *arguments, log, programs, devices=1, replaced=None):
    """Starts the script in a process that does not have to import anything.

    Args:
        name: of the script.
        arguments: what it is called with.
        log: the file to which everything it says is appended.
        programs: the folder of its compiled programs; whoever reads there passes over one that is
            half written.
        devices: how many it has.
        replaced: what it takes in the place of what, by name.
    """
    settings = {
        "jax_num_cpu_devices": devices,
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    call = (name, arguments, log, settings, replaced or {})
    process = forks().Process(target=forked, args=call, daemon=True)
    process.start()
    return process


def forked(name, arguments, log, settings, replaced):
    assert "preload" in sys.modules  # what could not be imported is passed over in silence
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for setting, value in settings.items():
        jax.config.update(setting, value)
    for target, value in replaced.items():
        mock.patch(target, value).start()
    try:
        run(name, *arguments)
    finally:
        atexit._run_exitfuncs()  # a process that is forked ends without


def die_after(beginning, line):
    """Takes the place of what prints: the first line that begins so is the last."""
    print(line, flush=True)
    if line.startswith(beginning):
        os.kill(os.getpid(), signal.SIGKILL)


def draw_nothing(*_):
    """Takes the place of what draws, where nobody looks at pictures."""
