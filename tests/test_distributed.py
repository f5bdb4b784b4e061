"""The MNIST experiment on a mesh: in one process, in two real ones, and when one of them dies."""

import argparse
import json
import os
import signal
import socket
import time
from itertools import count

import jax
import numpy as np
import pytest

from commands import draw_nothing, refusal, start_fork, start_process
from data import Split, digits
from mnist_files import write_mnist
from parts.devices import join

IMAGES = 203  # of which a mesh cannot give each device as many
STEPS = 4  # per epoch
# With some seeds an image comes so near a tie between two experts that rounding decides where it
# goes, and the losses part by what no tolerance describes; with this one they keep within 1e-6.
RUN = ["--batch-size", "51", "--hidden", "8", "--seed", "1"]
HUNDRED_STEPS = ["--epochs", str(100 // STEPS), "--model", "sparse"]
# A blend of all experts compiles fastest, and is saved and resumed like any other mixture.
INTERRUPTED = ["--epochs", "8", "--model", "soft", "--checkpoint-every", "5"]
MESH = ["--mesh", "data=2,expert=4"]
MESH_OF_TWO = ["--mesh", "data=2,expert=2"]  # processes, which then compile less


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few real digits in the form of MNIST."""
    all_of_them = digits()
    train = Split(*(array[:IMAGES] for array in all_of_them.train))
    test = Split(*(array[:50] for array in all_of_them.test))
    return write_mnist(tmp_path_factory.mktemp("data"), train, test).folder


@pytest.fixture(scope="module")
def fork(data, tmp_path_factory):
    """Starts the experiment without pictures, in processes that soon miss one another."""
    folder = tmp_path_factory.mktemp("forks")
    logs = (folder / f"{number}.log" for number in count())
    replaced = {"parts.reports.draw": draw_nothing, "parts.devices.SECONDS_TO_MISS": 5}

    def launch(out, *flags, devices):
        log = next(logs)
        process = start_fork(
            "mnist",
            *arguments(data, out, *flags),
            log=log,
            programs=folder / "programs",
            devices=devices,
            replaced=replaced,
        )
        return process, log

    return launch


@pytest.fixture
def start(fork):
    """Starts the experiment; what still runs when the test ends is killed."""
    started = []

    def launch(out, *flags, devices):
        started.append(fork(out, *flags, devices=devices))
        return started[-1]

    yield launch
    for process, _ in started:
        process.kill()
        process.join()


def arguments(data, out, *flags):
    return [*RUN, "--data-dir", str(data), "--out", str(out), *flags]


def two(*flags):
    """The flags of two processes that meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meet = [*flags, *MESH_OF_TWO, "--coordinator", address, "--processes", "2", "--process-id"]
    return [[*meet, str(number)] for number in range(2)]


def start_two(start, out, *flags):
    return [start(out, *own, devices=2) for own in two(*flags)]


def ended(started, seconds=300):
    """The exit code of a process, and what it has said."""
    process, log = started
    process.join(seconds)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


def finish(started):
    code, output = ended(started)
    assert code == 0, output
    return output


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([[record["train_loss"], record["test_loss"]] for record in records])


@pytest.fixture(scope="module")
def hundred_steps(fork, tmp_path_factory):
    """The losses of a hundred steps on one device."""
    out = tmp_path_factory.mktemp("hundred")
    finish(fork(out, *HUNDRED_STEPS, devices=1))
    assert losses(out).shape == (100 // STEPS, 2)
    assert losses(out)[-1, 0] < losses(out)[0, 0] / 2
    return losses(out)


@pytest.fixture(scope="module")
def uninterrupted(fork, tmp_path_factory):
    """The losses of a run on one device that nothing interrupts."""
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(fork(out, *INTERRUPTED, devices=1))
    assert losses(out)[-1, 0] < 0.6 * losses(out)[0, 0]
    return losses(out)


def test_losses_of_a_hundred_steps_on_a_mesh(start, tmp_path, hundred_steps):
    finish(start(tmp_path, *HUNDRED_STEPS, *MESH, devices=8))
    np.testing.assert_allclose(losses(tmp_path), hundred_steps, rtol=0, atol=1e-5)


def test_losses_of_a_hundred_steps_in_two_processes(data, tmp_path, hundred_steps):
    """As a user starts them: not forked."""
    commands = [arguments(data, tmp_path, *own) for own in two(*HUNDRED_STEPS)]
    processes = [start_process("mnist", *own, JAX_NUM_CPU_DEVICES="2") for own in commands]
    try:
        for process in processes:
            output = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    np.testing.assert_allclose(losses(tmp_path), hundred_steps, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(losses(tmp_path / "process-1"), losses(tmp_path))


@pytest.mark.parametrize(("victim", "devices"), [(0, 1), (1, 4)])
def test_when_a_process_dies_the_other_ends_and_the_run_goes_on_elsewhere(
    start, tmp_path, uninterrupted, victim, devices
):
    processes = start_two(start, tmp_path, *INTERRUPTED)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(losses(tmp_path)) > 3)
    processes[victim][0].kill()
    code, output = ended(processes[1 - victim], seconds=90)
    assert code != 0, output
    mesh = ["--mesh", "expert=4"] if devices == 4 else []
    output = finish(start(tmp_path, *INTERRUPTED, *mesh, "--resume", devices=devices))
    assert "resumed after step" in output
    np.testing.assert_allclose(losses(tmp_path), uninterrupted, rtol=0, atol=1e-5)


def test_a_signal_to_one_process_saves_the_run_of_both(start, tmp_path, uninterrupted):
    processes = start_two(start, tmp_path, *INTERRUPTED)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(losses(tmp_path)) > 2)
    os.kill(processes[1][0].pid, signal.SIGTERM)
    for process in processes:
        code, output = ended(process, seconds=90)
        assert code == 143, output
        assert "SIGTERM after step" in output
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    for process in start_two(start, tmp_path, *INTERRUPTED, "--resume", str(steps[0])):
        finish(process)
    np.testing.assert_allclose(losses(tmp_path), uninterrupted, rtol=0, atol=1e-5)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2"], "must have an axis expert, as data=2,expert=1 has"),
        (["--mesh", "data=2,expert=x"], "must be like data=2,expert=4"),
        (["--mesh", "data=2,expert=2"], "takes 4 devices and there are 8"),
        (["--mesh", "expert=1", "--processes", "2"], "needs --mesh and --coordinator"),
        ([*MESH, "--experts", "6"], "must stack a multiple of 4 experts"),
    ],
)
def test_meshes_that_cannot_be(data, tmp_path, capsys, flags, message):
    command = [*RUN, "--data-dir", str(data), "--out", str(tmp_path), *flags]
    assert message in refusal("mnist", *command, capsys=capsys)


def test_nothing_takes_the_place_of_the_handler_that_saves(monkeypatch):
    def initialize(*_, **__):
        assert not jax.config.jax_enable_preemption_service  # it would handle SIGTERM itself
        raise ConnectionError("enough")

    before = jax.config.jax_enable_preemption_service
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    args = argparse.Namespace(
        processes=2, process_id=0, mesh={"expert": 2}, coordinator="127.0.0.1:1", inspect=False
    )
    try:
        with pytest.raises(ConnectionError, match="enough"):
            join(argparse.ArgumentParser(), args)
    finally:
        jax.config.update("jax_enable_preemption_service", before)
