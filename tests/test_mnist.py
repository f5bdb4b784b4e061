"""The MNIST experiment, from its command line to its pictures, on real digits."""

import importlib
import io
import json
import os
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest

import moejax
from cases import normal, params_of
from commands import EXPERIMENTS, draw_nothing, refusal, run

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = "--dataset digits --hidden 16 --experts 3 --epochs 2".split()
PICTURES = {"curves.png", "confusion.png", "specialisation.png", "experts.png", "diagnostics.png"}
RECORDS = {"metrics.jsonl", "config.json", "summary.json"}
SUMMARY = {
    "dataset",
    "model",
    "parameters",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "expert_load",
    "gate_entropy",
    "seconds_per_epoch",
    "compile_seconds",
    "versions",
}

needs_mnist = pytest.mark.skipif(
    "MOEJAX_DATA_DIR" not in os.environ, reason="MOEJAX_DATA_DIR names no folder with MNIST"
)


def read(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture
def without_pictures(monkeypatch):
    """Runs draw no pictures, for tests that look at numbers only."""
    monkeypatch.setattr("parts.reports.draw", draw_nothing)


@pytest.fixture(scope="module")
def every_model(tmp_path_factory):
    """The folder of a run that trains all models, and what it printed."""
    out, printed = tmp_path_factory.mktemp("all"), io.StringIO()
    with redirect_stdout(printed):
        run("mnist", "--out", str(out), *SMALL, "--model", "all")
    return out, printed.getvalue()


def test_the_soft_mixture_learns(every_model):
    summary, history = read(every_model[0] / "soft")
    assert set(summary) >= SUMMARY
    assert summary["dataset"] == "digits"
    assert summary["parameters"] == 3 * (784 * 16 + 16 + 16 * 10 + 10) + 784 * 3 + 3
    assert [record["epoch"] for record in history] == [1, 2]
    assert history[1]["train_loss"] < history[0]["train_loss"] < 2.4
    assert summary["test_accuracy"] == history[-1]["test_accuracy"] > 0.5
    np.testing.assert_allclose(sum(summary["expert_load"]), 1, atol=1e-5)
    assert 0 < summary["gate_entropy"] <= np.log(3)


def test_all_models_are_compared(every_model):
    out, printed = every_model
    summaries = json.loads((out / "summary.json").read_text())["models"]
    assert list(summaries) == ["dense", "soft", "sparse", "hard"]
    assert (out / "curves.png").exists()
    assert summaries["dense"]["expert_load"] is None
    own = RECORDS - {"config.json"}
    written = {name: {path.name for path in (out / name).iterdir()} for name in summaries}
    assert written["dense"] == own | {"curves.png", "confusion.png"}
    assert written["soft"] == written["sparse"] == written["hard"] == own | PICTURES
    assert summaries["hard"]["gate_entropy"] < 1e-6  # one expert per image
    assert all(f"{summary['test_accuracy']:.2%}" in printed for summary in summaries.values())


@pytest.mark.parametrize("route", ["softmax-information", "noisy-top-k", "relu", "sinkhorn"])
def test_any_rule_trains_and_draws(route, tmp_path, capsys, empty_pictures):
    run("mnist", "--out", str(tmp_path), *SMALL, "--route", route)
    summary, history = read(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PICTURES | RECORDS
    assert summary["model"] == route
    assert summary["test_accuracy"] > 0.5
    assert f"{summary['test_accuracy']:.2%}" in capsys.readouterr().out
    assert all(len(record["expert_load"]) == 3 for record in history)
    for record in history:
        assert 1 <= record["effective_experts"] <= 3.001
        assert 0 <= record["mutual_information"] <= np.log(3)
        assert 1 / 3 <= record["confidence"] <= 1.001
        np.testing.assert_allclose(sum(record["choice_load"]), 1, atol=1e-4)


def test_every_rule_decides_and_balances(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    routes = importlib.import_module("parts.routes").ROUTES
    x = normal(0, 6, 4)
    for name, route in routes.items():
        router = route.router(moejax.linear(4, 3))
        layer = moejax.moe(moejax.linear(4, 2), router, num_experts=3, route=route.rule(2))
        params = params_of(layer)
        for key in (None, jax.random.key(2)):
            y, routing = layer.apply(params, x, key=key)
            assert y.shape == (6, 2), name
            assert np.isfinite(route.balance(routing)), name


def test_the_convolutional_expert(tmp_path, without_pictures):
    run("mnist", "--out", str(tmp_path), *SMALL, "--expert", "conv", "--experts", "2")
    summary, _ = read(tmp_path)
    assert summary["model"] == "soft"
    assert summary["test_accuracy"] > 0.5


def test_inspection_shows_the_step(tmp_path, capsys, without_pictures):
    small = "--dataset digits --hidden 16 --epochs 2 --model dense".split()
    run("mnist", "--out", str(tmp_path), *small, "--inspect")
    printed = capsys.readouterr().out
    sections = [printed.index(phase) for phase in ("after zeroing", "after backward", "after the")]
    assert sections == sorted(sections)
    zeroed, backward, updated = (
        next(line for line in printed[at:].splitlines() if line.startswith("layers.1.bias"))
        for at in sections
    )
    assert zeroed.endswith(" ".join([" 0.00e+00"] * 3))
    assert zeroed[:70] == backward[:70] != updated[:70]
    assert backward[80:] == updated[80:] != zeroed[80:]


def test_an_incomplete_final_batch_and_plain_sgd(tmp_path, without_pictures):
    run(
        "mnist",
        "--out",
        str(tmp_path),
        *"--dataset digits --model dense --hidden 50 --optimizer sgd --batch-size 1000".split(),
    )
    _, history = read(tmp_path)
    assert len(history) == 5
    assert abs(history[0]["train_loss"] - 2.303) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be a whole number from 1 to 1000000000, got 0"),
        (["--learning-rate", "-1"], "--learning-rate: must be a number from 1.18e-38 to 3.4e+38"),
        (["--learning-rate", "nan"], "must be a number from 1.18e-38 to 3.4e+38, got nan"),
        (["--learning-rate", "1e-46"], "must be a number from 1.18e-38 to 3.4e+38, got 1e-46"),
        (["--learning-rate", "1e300"], "must be a number from 1.18e-38 to 3.4e+38, got 1e300"),
        (["--model", "huge"], "invalid choice: 'huge'"),
        (["--model", "sparse", "--top-k", "9"], "`k` must be an integer between 1 and"),
        (["--model", "sparse", "--top-k", "1"], "exactly zero gradient"),
        (["--route", "hashed"], "invalid choice: 'hashed'"),
        (["--route", "relu", "--model", "all"], "not allowed with argument"),
        (["--data-dir", "/nowhere"], "/nowhere must be a folder"),
        (["--dataset", "digits", "--batch-size", "2000"], "(1437), got 2000"),
        (["--out", "/proc/none"], "choose another folder"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, message, capsys, tmp_path):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert message in refusal("mnist", *out, *arguments, capsys=capsys)
    assert not list(tmp_path.iterdir())


@needs_mnist
def test_the_baseline_of_the_study(tmp_path):
    baseline = (
        "--dataset mnist --model dense --hidden 50 --optimizer sgd --learning-rate 0.001 "
        "--batch-size 60000 --epochs 3"
    )
    run("mnist", "--out", str(tmp_path), *baseline.split())
    summary, history = read(tmp_path)
    assert summary["dataset"] == "mnist"
    assert len(history) == 3
    assert abs(history[0]["train_loss"] - np.log(10)) < 0.03
    assert history[2]["train_loss"] < history[0]["train_loss"]


@needs_mnist
def test_the_soft_mixture_passes_97_percent(tmp_path, optimized):
    run("mnist", "--out", str(tmp_path), "--dataset", "mnist")
    summary, history = read(tmp_path)
    assert len(history) == 5
    assert summary["test_accuracy"] > 0.97
