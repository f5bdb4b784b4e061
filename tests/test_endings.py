"""How an experiment ends: real processes, interrupted at every moment or started in a bad place."""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from commands import refusal, run, start_process
from mnist_files import write_small_mnist
from parts import ending
from parts.folders import temporary_folder

pytestmark = pytest.mark.usefixtures("standard_promotion")

TOY = "--samples 30 --steps 20 --seeds 2".split()
SAMPLE = "--epochs 1000 --batch-size 4000".split()
DIGITS = "--dataset digits --hidden 4 --model dense".split()


def wait_for(condition, process):
    until = time.monotonic() + 300
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    assert condition()


def catches(process, signum):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signum - 1) & 1)


MOMENTS = {
    "imports": ("toy", TOY, lambda out: True),
    "compiling": ("toy", [*TOY, "--no-cache"], lambda out: (out / "data.png").exists()),
    "training": ("mnist", [*DIGITS, "--epochs", "100000"], lambda out: epochs(out) > 2),
    "seeds": ("upcycle", SAMPLE, lambda out: True),
    "drawing": ("toy", TOY, lambda out: (out / "boundaries.png").exists()),
}


def epochs(out):
    with contextlib.suppress(OSError):
        return len((out / "metrics.jsonl").read_text().splitlines())
    return 0


@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        ("imports", signal.SIGINT),
        ("compiling", signal.SIGTERM),
        ("training", signal.SIGINT),
        ("seeds", signal.SIGTERM),
        ("drawing", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_run_with_one_line(moment, signum, tmp_path):
    name, arguments, come = MOMENTS[moment]
    process = start_process(name, "--out", str(tmp_path), *arguments)
    wait_for(lambda: catches(process, signal.SIGTERM) and come(tmp_path), process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    lines = [line for line in err.splitlines() if not line.startswith("training ")]
    assert lines == [f"{name}.py: {signum.name}: stopped before the end"]
    assert not list(tmp_path.glob(".*"))  # no file that is half written


def test_a_run_ends_well_in_a_poor_place(tmp_path):
    """An ASCII terminal, a path that is not, a notebook's backend, and a reader that goes away."""
    out = tmp_path / "Fräulein"
    process = start_process(
        "toy",
        *("--out", str(out), *TOY),
        PYTHONIOENCODING="ascii",
        MPLBACKEND="module://no_such_package",
    )
    with process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0, err
    assert "Error" not in err
    assert {path.name for path in out.iterdir()} >= {"summary.json", "loss.png", "training.gif"}
    with Image.open(out / "training.gif") as animation:
        assert animation.n_frames > 5


def test_a_device_that_is_not_there(tmp_path):
    process = start_process("toy", "--out", str(tmp_path), *TOY, JAX_PLATFORMS="cuda")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("toy.py: ")
    assert "JAX_PLATFORMS=cuda" in err
    assert err.count("\n") == 1, err


def test_two_runs_do_not_share_a_folder(tmp_path, capsys, empty_pictures):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    message = refusal("toy", "--out", str(tmp_path), *TOY, capsys=capsys)
    assert f"another run writes to --out {tmp_path}" in message
    os.close(handle)  # as the system does for a run that is killed
    run("toy", "--out", str(tmp_path), *TOY)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    hot = "--optimizer sgd --learning-rate 1e38".split()
    message = refusal("mnist", "--out", str(tmp_path), *DIGITS, *hot, capsys=capsys, code=1)
    assert "the loss is not finite at step" in message


def test_a_loss_that_is_not_finite_after_the_last_step_ends_the_run(tmp_path, capsys):
    hot = "--optimizer sgd --learning-rate 1e30".split()
    # One step, whose loss is of the start.
    options = [*DIGITS, *hot, "--epochs", "1", "--batch-size", "1437"]
    for name in ("summary.json", "experts.png"):
        (tmp_path / name).write_text("of an earlier run")
    message = refusal("mnist", "--out", str(tmp_path), *options, capsys=capsys, code=1)
    assert "the loss is not finite at step 1:" in message
    assert "try a smaller --learning-rate" in message
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_disk_that_is_full_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", full)
    message = refusal("toy", "--out", str(tmp_path), *TOY, capsys=capsys, code=1)
    assert message == "toy.py: [Errno 28] No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_a_missing_package_ends_in_one_line(capsys):
    error = ModuleNotFoundError("No module named 'scipy'")
    ending._one_line_for_missing_packages(type(error), error, None)
    assert "No module named 'scipy': pip install -e '.[experiments]'\n" in capsys.readouterr().err
    ending._one_line_for_missing_packages(KeyError, KeyError("x"), None)
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_a_signal_cleans_up_before_it_ends_the_process(monkeypatch, capfd):
    done = []
    monkeypatch.setattr(os, "_exit", done.append)
    with (
        temporary_folder() as folder,
        ending.before_the_end(lambda: done.append(Path(folder).exists())),
    ):
        ending.end_at_once(signal.SIGTERM)
        assert not Path(folder).exists()
    assert done == [True, 143]  # the inner one first
    ending.end_at_once(signal.SIGINT)
    assert done == [True, 143, 130]
    assert "SIGINT: stopped before the end" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("toy", [f"--samples={10**9}", "--experts=1000"], "this run would take"),
        (
            "toy",
            ["--experts", "100000000"],
            "choose a smaller --samples, --steps, --seeds or --exp",
        ),
        ("mnist", ["--hidden", str(10**9)], "of memory, and this machine has"),
        (
            "mnist",
            "--dataset digits --expert conv --hidden 1 --experts 1000 --batch-size 60000".split(),
            "this run would take",
        ),
        ("mnist", ["--experts", "100000000"], "choose a smaller --experts, --hidden or --batch"),
        ("toy", ["--seed", str(2**32)], "must be a whole number from 0 to 4294967295"),
        ("mnist", ["--seed", str(2**32)], "must be a whole number from 0 to 4294967295"),
        ("toy", ["--samples", "²"], "must be a whole number from 2 to 1000000000, got ²"),
        ("toy", ["--samples", "9" * 5000], "must be a whole number from 2 to 1000000000, got 999"),
        ("toy", ["--out", ""], "argument --out: must name a folder, got nothing"),
        ("toy", ["--out", __file__], "--out must be a folder, got the file"),
        ("toy", ["--out", "s3://bucket/run"], "must be a folder on this machine, got s3://bucket"),
        ("toy", ["--out", "s3:/bucket/run"], "must be a folder on this machine, got s3:/bucket"),
        (
            "toy",
            ["--out", "~nobody-of-this-name/run"],
            "got ~nobody-of-this-name/run: no such user",
        ),
        ("heads", ["--batch-size", "1"], "must be a whole number from 2 to 1000000000, got 1"),
        ("mnist", ["--data-dir", "gs://bucket"], "must be a folder on this machine, got gs://"),
        ("benchmark", ["--out", __file__], "--out must be a folder, got the file"),
        ("upcycle", ["--data-dir", "/no/such"], "/no/such"),
        ("upcycle", ["--seed", str(2**32 - 2), "--seeds", "3"], "--seeds must be at most 2"),
        ("language_model", ["--seed", "7"], "unrecognized arguments: --seed 7"),
        ("language_model", ["--text", "/no/such"], "--text must name files, got nothing called"),
        ("efficiency", ["--docs", "/no/such"], "--docs must be a folder that has studies.md"),
        ("upcycle", ["--seeds", "0"], "must be a whole number from 1 to 1000000000, got 0"),
        ("mnist", ["--data-dir", ""], "argument --data-dir: must name a folder, got nothing"),
        ("mnist", ["--coordinator", "localhost"], "must be HOST:PORT, such as 127.0.0.1:9876, got"),
        ("mnist", ["--coordinator", "a:1"], "do nothing without --mesh and --processes"),
        ("mnist", ["--top-k", "3"], "--top-k does nothing with --model soft"),
        (
            "mnist",
            ["--route", "switch", "--top-k", "3"],
            "--top-k does nothing with --route switch",
        ),
        ("mnist", ["--model", "dense", "--experts", "3"], "--experts does nothing with"),
        ("mnist", ["--dataset", "digits", "--data-dir", "."], "--data-dir does nothing with"),
        ("mnist", ["--model", "all", "--resume", "0"], "--resume STEP goes with one --model"),
        ("mnist", ["--mesh", "expert=²"], "must be like data=2,expert=4, got expert=²"),
        ("mnist", [*DIGITS, "--epochs", str(10**9)], "--epochs must be at most"),
    ],
)
def test_what_cannot_be_is_refused(name, arguments, message, capsys, tmp_path):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert message in refusal(name, *out, *arguments, capsys=capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("heads", "--epochs"),
        ("sharpness", "--epochs"),
        ("upcycle", "--epochs and --more-epochs together"),
    ],
)
def test_steps_that_cannot_be_counted_are_refused(name, options, capsys, tmp_path):
    folders = ["--data-dir", str(write_small_mnist(tmp_path / "data").folder)]
    folders += ["--out", str(tmp_path / "out")]
    sizes = ["--batch-size", "3", "--epochs", str(10**9)]
    message = refusal(name, *folders, *sizes, capsys=capsys)
    assert f"{options} must be at most 100,000,000 here, got 100000000" in message


@pytest.mark.parametrize("variable", ["MOEJAX_CACHE_DIR", "XDG_CACHE_HOME", "MOEJAX_DATA_DIR"])
def test_a_variable_must_name_a_folder_on_this_machine(variable, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for other in ("MOEJAX_CACHE_DIR", "MOEJAX_DATA_DIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, "s3://bucket/cache")
    out = ["--out", str(tmp_path / "out")]
    # Parameters are compiled while images are looked for, so they are few.
    message = refusal("mnist", *out, "--model=dense", "--hidden=4", capsys=capsys)
    assert f"{variable} must be a folder on this machine, got s3://bucket/cache" in message
    assert not list(tmp_path.glob("s3*"))


@pytest.mark.parametrize("name", ["toy", "mnist"])
def test_help_says_what_each_option_does_and_its_default(name, capsys):
    with pytest.raises(SystemExit):
        run(name, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    options = shown.split(" --")[1:]
    assert len(options) > 7
    assert "(default: 0)" in shown


def test_the_largest_seed_is_another_one(tmp_path, empty_pictures):
    summaries = []
    for seed in (0, 2**32 - 1):
        out = tmp_path / str(seed)
        run("toy", "--out", str(out), *TOY, "--seed", str(seed))
        summaries.append((out / "summary.json").read_text())
    assert summaries[0] != summaries[1]
