"""A run that is killed again and again ends with the bits of one that never was."""

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax
from commands import draw_nothing, refusal, run, start_fork
from mnist_files import write_small_mnist
from moejax import checkpoint
from moejax.training import (
    batch_sizes,
    empty_metrics,
    epoch_order,
    init_state,
    train_epoch,
    train_step,
    train_until,
)
from parts import ending, resume
from reference import close

pytestmark = pytest.mark.usefixtures("standard_promotion")

# The quickest model to start; test_distributed has runs of mixtures that go on.
SIZES = "--model dense --hidden 4 --batch-size 2".split()
EPOCHS = 3
STEPS_PER_EPOCH = 31  # of 61 images, so that the last batch is smaller


def leaves(out):
    """The SHA-256 of everything in the last checkpoint."""
    folder = out / "checkpoints"
    manifest = folder / str(checkpoint.latest(folder)) / "manifest" / "metadata"
    return json.loads(manifest.read_text())["leaves"]


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("size", [60, 61])  # without and with a smaller batch at the end
def test_an_epoch_in_pieces_is_the_epoch_bit_by_bit(size):
    model = moejax.moe(moejax.mlp(4, 8, 3), moejax.linear(4, 3), num_experts=3)
    optimizer = optax.adam(0.1)

    def loss(params, batch, key):
        y, _ = model.apply(params, batch)
        return jnp.mean(y**2) + jax.random.normal(key), {"largest": jnp.max(y, axis=0)}

    data = jax.random.normal(jax.random.key(1), (size, 4))
    state = init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(2))
    step, steps = train_step(loss, optimizer), len(batch_sizes(size, 4))
    unseen = empty_metrics(step, state, data, batch_size=4)
    whole = jax.jit(partial(train_epoch, step, batch_size=4))
    piece = jax.jit(partial(train_until, step, batch_size=4))
    final = state
    for epoch in range(2):
        order = epoch_order(final, epoch, size)
        final, last_metrics = piece(final, unseen, data, order, (epoch + 1) * steps)
    expected = final.params, final.opt_state, last_metrics
    # Another program, which may round otherwise.
    other, other_metrics = whole(whole(state, data)[0], data)
    close((other.params, other_metrics), (final.params, last_metrics), rtol=1e-4)
    draw = random.Random(0)
    for longest in (1, 2, 5, steps):
        metrics = unseen
        pieces, at = state, 0
        while at < 2 * steps:
            epoch = at // steps
            stop = min(at + draw.randint(1, longest), (epoch + 1) * steps)
            order = epoch_order(pieces, epoch, size)
            metrics = unseen if at % steps == 0 else metrics
            pieces, metrics = piece(pieces, metrics, data, order, stop)
            assert pieces.step == stop
            at = stop
        same = np.testing.assert_array_equal
        jax.tree.map(same, (pieces.params, pieces.opt_state, metrics), expected)
    beyond, _ = piece(state, unseen, data, epoch_order(state, 0, size), 10 * steps)
    assert beyond.step == steps


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts runs without pictures as processes of their own."""
    folder = tmp_path_factory.mktemp("resume")
    write_small_mnist(folder / "data", train_size=61, test_size=20)

    def begin(out, *arguments):
        return start_fork(
            "mnist",
            *("--out", str(out), "--data-dir", str(folder / "data"), *SIZES, *arguments),
            log=out.with_suffix(".log"),
            programs=folder / "programs",
            replaced={"parts.reports.draw": draw_nothing},
        )

    return begin


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    finish(start(out, "--epochs", str(EPOCHS), "--checkpoint-every", "1000"), out)
    return out


def finish(process, out, exitcode=0):
    process.join()
    assert process.exitcode == exitcode, log(out)


def log(out):
    return out.with_suffix(".log").read_text()


def complaint(out):
    """The one line of the program itself: tensorstore's threads may print after it, of orbax's loop
    that is closed by then."""
    lines = [line for line in log(out).splitlines() if line.startswith("mnist.py: ")]
    assert len(lines) == 1, log(out)
    return lines[0]


def unfinished(out):
    return {path.name for path in (out / "checkpoints").glob("*.orbax-checkpoint-tmp*")}


def wait_for(condition, process, seconds=60.0):
    """Whether the condition came true while the process was running."""
    until = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.001)
    return False


def started(out, step):
    return lambda: (checkpoint.latest(out / "checkpoints") or 0) >= step


def while_it_starts(out, process, draw):
    process.join(timeout=draw.uniform(0.1, 1))


def while_it_trains(out, process, draw):
    newest = checkpoint.latest(out / "checkpoints") or 0
    wait_for(started(out, newest + draw.randint(1, 4)), process)
    time.sleep(draw.uniform(0, 0.1))  # a step and its save take about as long


def while_it_saves(out, process, draw):
    before = unfinished(out)
    wait_for(lambda: unfinished(out) - before, process)
    time.sleep(draw.uniform(0, 0.02))


OFTEN = ["--epochs", str(EPOCHS), "--checkpoint-every", "1"]
TO_THE_END = ["--epochs", str(EPOCHS), "--checkpoint-every", "1000", "--resume"]


def test_killed_at_any_moment(start, reference, tmp_path):
    out, draw = tmp_path / "killed", random.Random(0)
    moments = [while_it_starts] * 2 + [while_it_trains] * 3 + [while_it_saves] * 11
    draw.shuffle(moments)
    saving = 0
    for comes in moments:
        process = start(out, *OFTEN, "--resume")
        comes(out, process, draw)
        process.kill()
        finish(process, out, -signal.SIGKILL)
        saving += bool(unfinished(out))
    assert 0 < checkpoint.latest(out / "checkpoints") < EPOCHS * STEPS_PER_EPOCH
    assert saving >= 5
    finish(start(out, *TO_THE_END), out)
    assert_same_run(out, reference)
    assert not unfinished(out)


def assert_same_run(out, reference):
    assert [record["epoch"] for record in records(out)] == list(range(1, EPOCHS + 1))
    assert records(out) == records(reference)
    assert leaves(out) == leaves(reference)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(start, reference, tmp_path, signum):
    out = tmp_path / "stopped"
    process = start(out, "--epochs", str(EPOCHS), "--checkpoint-every", "7")
    assert wait_for(started(out, STEPS_PER_EPOCH + 4), process), log(out)
    os.kill(process.pid, signum)
    finish(process, out, 128 + signum)
    step = checkpoint.latest(out / "checkpoints")
    assert log(out).splitlines()[-1] == (
        f"mnist.py: {signum.name} after step {step}, which is saved: repeat the command with "
        "--resume to go on"
    )
    finish(start(out, *TO_THE_END), out)
    assert f"resumed after step {step}\n" in log(out)
    assert_same_run(out, reference)


def limit_files(process, size):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_costs_nothing_saved(start, reference, tmp_path):
    out = tmp_path / "full"
    process = start(out, *OFTEN)
    assert wait_for(started(out, 5), process), log(out)
    limit_files(process, 10_000)
    finish(process, out, 1)
    step = checkpoint.latest(out / "checkpoints")
    said = f"could not be written to {out}/checkpoints; the newest complete one is {step}"
    assert said in complaint(out)
    finish(start(out, *TO_THE_END), out)
    assert_same_run(out, reference)


def test_a_full_disk_is_reported_before_training(start, tmp_path):
    out = tmp_path / "full"
    process = start(out, *OFTEN, "--hidden", "800")
    limit_files(process, 2**20)
    finish(process, out, 1)
    assert complaint(out).startswith("mnist.py: A checkpoint could not be written to")
    assert "epoch" not in log(out)


def test_more_epochs_go_on_from_a_finished_run(start, reference, tmp_path):
    out = tmp_path / "longer"
    finish(start(out, "--epochs", "1", "--checkpoint-every", "1000"), out)
    finish(start(out, *TO_THE_END), out)
    assert_same_run(out, reference)


def test_a_signal_during_the_last_save_ends_the_run(monkeypatch, tmp_path):
    @contextmanager
    def writer(folder, keep):
        yield None
        ending._Watch.act(signal.SIGTERM)  # as the thread does that listens for signals

    ended = []
    monkeypatch.setattr(checkpoint, "writer", writer)
    monkeypatch.setattr(resume, "end_at_once", ended.append)
    with resume.pauses(resume.Plan(tmp_path, 1, 1, {})):
        pass
    assert ended == [signal.SIGTERM]


DIGITS = "--dataset digits --model dense --hidden 4 --epochs 2".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run in this process, with checkpoints at steps 10 and 20."""
    out = tmp_path_factory.mktemp("finished")
    run("mnist", "--out", str(out), *DIGITS, "--checkpoint-every", "10")
    return out


def everything(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "up to step 24: go on with it by --resume, or choose another --out"),
        (["--resume", "--seed", "1"], "--seed must be what the run began with, 0; got 1"),
        (["--resume", "--hidden", "5"], "--hidden must be what the run began with, 4; got 5"),
        (["--resume", "--batch-size", "64"], "--batch-size must be what the run began with, 128"),
        (["--resume", "--model", "soft"], "--model must be what the run began with, dense"),
        (["--resume", "--epochs", "1"], "--epochs must be at least 2, got 1"),
        (["--resume", "7"], "must be a checkpoint of step 7"),
        (["--resume", "-1"], "must be a whole number from 0 to"),
        (["--checkpoint-every", "0"], "must be a whole number from 1 to"),
    ],
)
def test_what_is_refused_changes_nothing(finished, arguments, message, capsys):
    before = everything(finished)
    assert message in refusal("mnist", "--out", str(finished), *DIGITS, *arguments, capsys=capsys)
    assert everything(finished) == before


def test_all_models_are_checked_before_one_is_trained(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "hard")
    message = refusal("mnist", "--out", str(tmp_path), *DIGITS, "--model", "all", capsys=capsys)
    assert "hard/checkpoints holds checkpoints of an earlier run, up to step 24" in message
    assert not (tmp_path / "dense").exists()


def test_checkpoints_change_no_number(finished, tmp_path):
    run("mnist", "--out", str(tmp_path), *DIGITS)
    assert records(tmp_path) == records(finished)
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_offered(finished, tmp_path, capsys):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    manifest = out / "checkpoints" / "24" / "manifest" / "metadata"
    manifest.write_text(manifest.read_text().replace("seconds", "second5"))
    command = ["--out", str(out), *DIGITS]
    message = refusal("mnist", *command, "--resume", capsys=capsys)
    assert f"Checkpoint 24 in {out}/checkpoints is damaged: " in message
    assert "The one before it is intact: step 20. Choose another one by --resume STEP." in message
    run("mnist", *command, "--resume", "20")
    assert "resumed after step 20\n" in capsys.readouterr().out
    assert records(out) == records(finished)
    assert leaves(out) == leaves(finished)


def test_a_step_to_resume_must_be_there(tmp_path, capsys):
    message = refusal("mnist", "--out", str(tmp_path), *DIGITS, "--resume", "7", capsys=capsys)
    assert "--resume 7: there is no checkpoint in" in message


def test_nothing_to_resume_starts_from_the_beginning(finished, tmp_path, capsys):
    run("mnist", "--out", str(tmp_path), *DIGITS, "--resume")
    assert "starting from the beginning" in capsys.readouterr().out
    assert leaves(tmp_path) == leaves(finished)
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [0, 12, 24]  # once an epoch


def test_a_folder_that_cannot_be_written_is_reported_before_training(tmp_path, capsys):
    (tmp_path / "checkpoints").touch()
    command = ["--out", str(tmp_path), *DIGITS, "--checkpoint-every", "5"]
    message = refusal("mnist", *command, capsys=capsys, code=1)
    assert "A checkpoint could not be written to" in message


def test_a_folder_that_is_not_utf8_is_refused_for_checkpoints_alone(tmp_path, capsys):
    command = ["--out", str(tmp_path / "Fr\udcc3\udca4ulein"), *DIGITS]
    message = refusal("mnist", *command, "--checkpoint-every", "5", capsys=capsys)
    assert "set PYTHONUTF8=1, or choose another --out" in message
    run("mnist", *command)


def test_too_little_room_is_reported_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    command = ["--out", str(tmp_path), *DIGITS, "--checkpoint-every", "5"]
    assert " must be free in" in refusal("mnist", *command, capsys=capsys, code=1)
    assert not list(tmp_path.iterdir())
