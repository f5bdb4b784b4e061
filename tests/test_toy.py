"""The toy experiment, from its command line to its pictures."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import toy
from commands import refusal, run
from moejax import plot
from reference import close

pytestmark = pytest.mark.usefixtures("standard_promotion")

README = (Path(__file__).parent.parent / "README.md").read_text()
FILES = {"summary.json", "data.png", "boundaries.png", "loss.png", "training.gif"}


@pytest.fixture
def one_frame(monkeypatch):
    """Of an animation only the first frame is drawn."""
    save = plot.save_animation
    monkeypatch.setattr(plot, "save_animation", lambda frames, path: save([next(frames)], path))


def test_two_experts_solve_what_one_cannot(tmp_path, capsys):
    run("toy", "--out", str(tmp_path), "--seeds", "5")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == FILES
    [said] = re.findall(r"accuracy \((\S+)%, and\s+(\S+)% for a single expert\)", README)
    found = summary["accuracy"], summary["single_expert_accuracy"]  # whatever --seeds is
    assert found == pytest.approx([float(percent) / 100 for percent in said], abs=0.005)
    assert summary["final_loss"] < 0.08
    assert lost_without_the_blend(summary) > 0.02  # the experts cooperate
    seeds = summary["seeds"]
    assert seeds["count"] == 5
    assert seeds["accuracy_min"] <= seeds["accuracy_median"] <= seeds["accuracy_max"]
    assert summary["steps_per_second"] > 0
    assert summary["compile_seconds"] > 0
    printed = capsys.readouterr().out
    assert f"{summary['accuracy']:.1%}" in printed
    assert "steps/s over all runs" in printed
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.n_frames == 16


def lost_without_the_blend(summary):
    """How much accuracy is lost if each point is left to its top expert, over the seeds."""
    seeds = summary["seeds"]
    return seeds["accuracy_median"] - seeds["top_expert_alone_median"]


def test_under_the_likelihood_experts_compete(tmp_path, empty_pictures):
    run("toy", "--out", str(tmp_path), *"--seeds 5 --objective likelihood".split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert summary["objective"] == "likelihood"
    assert summary["accuracy"] > 0.9 > 0.8 > summary["single_expert_accuracy"]
    assert abs(lost_without_the_blend(summary)) < 0.01


def test_runs_of_other_sizes(tmp_path, one_frame):
    arguments = "--samples 7 --steps 3 --experts 3 --seeds 2 --seed 1".split()
    run("toy", "--out", str(tmp_path), *arguments)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_runs_taken_in_groups_are_the_runs_taken_alone(monkeypatch):
    monkeypatch.setattr(toy, "GROUP", 2)  # so that the last of three runs leaves a group unfilled
    task, steps = toy.cooperating(2), 3
    data, initial, _ = toy.begin(task, 20, 2, np.uint32(0))
    runs, _ = toy.train(task, data, steps, initial)
    assert len(runs["loss"]) == 3
    on_host = jax.device_get(initial)
    alone = jax.jit(partial(toy.run, task, data, steps))
    for number in range(3):
        start = jax.tree.map(lambda leaf, i=number: leaf[i], on_host)
        close(runs["loss"][number], alone(start)["loss"], rtol=1e-5)


def test_the_same_seed_gives_the_same_numbers(tmp_path, empty_pictures):
    results = []
    for name in ("a", "b"):
        run("toy", "--out", str(tmp_path / name), *"--samples 20 --steps 4 --seeds 2".split())
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        results.append([summary[key] for key in ("final_loss", "accuracy", "seeds")])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number from 1 to 1000000000, got 0"),
        (["--samples", "many"], "--samples"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--out", "/proc/none"], "choose another folder"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, message, capsys):
    assert message in refusal("toy", *arguments, capsys=capsys)
