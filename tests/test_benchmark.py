"""The benchmark, on problems so small that only its machinery is tested."""

import json
import os

import jax
import numpy as np
import pytest

from benchmarks import report, steps, timing, whole_runs
from benchmarks.sparsity import relu_of_sparsity
from benchmarks.whole_runs import SCRIPT
from commands import forks, refusal, run
from pages import DOCS
from parts.ending import EndedError
from parts.records import cores

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_limits")


LIMITS = {"SIDE": 128, "READ": 2**16, "TURN": 1e-3}


@pytest.fixture
def small_limits(monkeypatch):
    """Lets the machine's limits be measured on less, and everything in short turns."""
    for name, value in LIMITS.items():
        monkeypatch.setattr(timing, name, value)


def measured_on_less(shape, rounds):
    """`measured` in a process of its own, in which nothing is patched yet."""
    for name, value in LIMITS.items():
        setattr(timing, name, value)
    return steps.measured(shape, rounds)


@pytest.fixture
def forked(monkeypatch):
    """Processes do not have to import anything."""
    for suite in ("steps", "traffic"):
        monkeypatch.setattr(f"benchmarks.{suite}.get_context", lambda method: forks())
    monkeypatch.setattr(steps, "measured", measured_on_less)


def test_the_grouped_product_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run("benchmark", "--out", str(tmp_path), "--quick", "--suite", "grouped")
    summary = json.loads((tmp_path / "summary.json").read_text())
    [result] = summary["results"]
    timed = {(one["contender"], one["mode"]): one for one in result["records"]}
    modes = ("forward", "with backward")
    assert {("grouped_matmul", mode) for mode in modes} < set(timed)
    assert {("ragged_dot", mode) for mode in modes} < set(timed)
    limit = timed["product of 2048", ""]
    assert limit["share"] == 1
    for record in timed.values():
        assert record["seconds"] > 0
        assert record["rounds"] == 2
        assert record["peak_bytes"] >= record["temporary_bytes"]
        flops = 2 * result["sizes"]["T"] * result["sizes"]["K"] * 32 * 64
        if record["mode"]:
            expected = flops * (1 if record["mode"] == "forward" else 3)
            rate = 2 * timing.SIDE**3 / limit["seconds"]
            np.testing.assert_allclose(record["matmul_floor"], expected / rate, rtol=1e-4)
    printed = capsys.readouterr().out
    assert all(contender in printed for contender, _ in timed)
    assert summary["environment"]["OMP_NUM_THREADS"] == "2"
    assert f"cores of {summary['versions']['processor']}" in printed


def test_a_whole_step_is_timed_beside_its_peers(tmp_path, capsys, forked):
    run("benchmark", "--out", str(tmp_path), "--quick", "--suite", "step")
    [result] = json.loads((tmp_path / "summary.json").read_text())["results"]
    timed = {(one["contender"], one["mode"]): one for one in result["records"]}
    for mode in ("forward", "with backward", "whole step"):
        for name in ("dropless", "gathered weights"):
            assert timed[name, mode]["seconds"] > 0
            assert timed[name, mode]["compile_seconds"] > 0
    printed = capsys.readouterr().out
    assert "times the rate of the fastest peer" in printed
    peers = ["gathered weights"]
    if ("transformers grouped_mm", "whole step") in timed:
        peers.append("transformers grouped_mm")
    fastest = min(timed[name, "whole step"]["seconds"] for name in peers)
    expected = fastest / timed["dropless, keep_gradients", "whole step"]["seconds"]
    last = next(line for line in printed.splitlines() if line.startswith("T=64 "))
    assert f"{expected:.2f} (" in last


def test_relu_is_timed_at_its_sparsity(tmp_path):
    run("benchmark", "--out", str(tmp_path), "--quick", "--suite", "relu")
    [result] = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert result["sizes"]["sparsity"] == 0.75
    assert {"dense", "dropless"} < {one["contender"] for one in result["records"]}
    limit, *_, dense, _, sparse, _ = result["records"]
    active = 6 * 64 * (8 / 4) * 16 * 32  # of T, a quarter of K = 8, D and F
    for one in (dense, sparse):
        flops = one["matmul_floor"] / limit["matmul_floor"] * 2 * timing.SIDE**3
        np.testing.assert_allclose(flops, active, rtol=1e-4)
    logits = jax.random.normal(jax.random.key(0), (100, 8))
    chosen = relu_of_sparsity(0.75, logits).weights > 0
    np.testing.assert_allclose(chosen.mean(), 0.25, atol=0.01)


def test_traffic_is_counted(tmp_path, capsys, forked):
    run("benchmark", "--out", str(tmp_path), "--quick", "--suite", "traffic")
    [result] = json.loads((tmp_path / "summary.json").read_text())["results"]
    rows, width = 32 * 2, 4 * 8  # choices on each device, bytes of one row
    alone, mixed = result["records"]
    assert (alone["data"], alone["expert"]) == (1, 4)
    assert (mixed["data"], mixed["expert"]) == (2, 2)
    np.testing.assert_allclose(alone["least_exchange"], 3 * rows * 3 / 4 * width)
    np.testing.assert_allclose(mixed["least_exchange"], 3 * rows / 2 * width)
    for record in (alone, mixed):
        assert record["exchange"] >= record["least_exchange"]
        assert record["gradients"] >= record["least_gradients"]
    assert "   1 x 4 " in capsys.readouterr().out


def test_the_experiment_that_is_timed_is_there():
    assert SCRIPT.is_file()


def test_peers_get_a_thread_for_each_core_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_a_run_that_fails_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(whole_runs, "SCRIPT", "no_such_script.py")
    with pytest.raises(EndedError, match=r"no_such_script.py .* ended with 2"):
        whole_runs.stages([])


def test_the_page_says_what_the_grey_lines_are():
    limit = {"seconds": 1.0, "matmul_floor": 0.5, "memory_floor": 0.1}
    records = [
        {"contender": report.DROPLESS, "mode": mode, **limit}
        for mode in (timing.FORWARD, timing.BACKWARD)
    ]
    sizes = {"T": 4, "D": 2, "F": 2, "K": 2}
    series = [timing.Result("scaling", {**sizes, "E": count}, records, {}) for count in (8, 16)]
    legend = report.times(series, "E").legends[0]
    lines = zip(legend.get_lines(), legend.get_texts(), strict=True)
    grey = {line.get_linestyle(): text.get_text() for line, text in lines}
    page = " ".join((DOCS / "speed.md").read_text().split())
    assert f"dashed: {grey['--']}" in page
    assert f"dotted: {grey[':']}" in page


def test_an_unknown_suite_is_refused(capsys):
    assert "invalid choice: 'speed'" in refusal("benchmark", "--suite", "speed", capsys=capsys)
