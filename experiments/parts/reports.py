"""What the MNIST experiment writes: a line per epoch, a summary, pictures, a look inside a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.training import ParameterStep
from parts.command_line import say
from parts.output import save_figure
from parts.records import rounded, versions

HEADER = "epoch   train loss  accuracy   test loss  accuracy   seconds"
LINE = (
    "{epoch:5d} {train_loss:12.4f} {train_accuracy:9.2%} {test_loss:11.4f} {test_accuracy:9.2%} "
    "{seconds:9.2f}"
)
DIAGNOSTICS = (
    "gate_entropy",
    "confidence",
    "effective_experts",
    "dead_experts",
    "mutual_information",
    "expert_load",
    "choice_load",
)
TITLES = {
    "confidence": "confidence: the largest gate",
    "dead_experts": "dead experts: hardly any gate",
    "mutual_information": "what the expert tells about the digit",
    "expert_load": "share of the gate, by expert",
    "choice_load": "share of the choices, by expert",
}
PICTURES = ("curves.png", "confusion.png", "diagnostics.png", "specialisation.png", "experts.png")
SCORES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Run(NamedTuple):
    """A finished training run.

    Attributes:
        history: one record per epoch.
        test: the last evaluation.
        parameters: how many numbers the model has.
        compile_seconds: how long compilation took.
    """

    history: list[dict[str, Any]]
    test: dict[str, Any]
    parameters: int
    compile_seconds: float


def epoch_record(
    number: int,
    sizes: tuple[int, ...],
    metrics: dict[str, jax.Array],
    test: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl; the training columns are means over the epoch's examples."""
    record = {
        "epoch": number,
        "train_loss": np.average(metrics["cross_entropy"], weights=sizes),
        "train_accuracy": np.average(metrics["accuracy"], weights=sizes),
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "seconds": seconds,
        **{name: test[name] for name in DIAGNOSTICS if name in test},
    }
    return rounded(record)


def varies(history: list[dict[str, Any]], name: str) -> bool:
    """Whether a quantity could have come out otherwise: loads that stay equal are the rule's."""
    loads = np.array([record[name] for record in history])
    return loads.ndim < 2 or loads.shape[1] == 1 or not np.allclose(loads, loads[0, 0])


def shown(history: list[dict[str, Any]]) -> list[str]:
    """The diagnostics that say something about this model."""
    return [name for name in DIAGNOSTICS if name in history[0] and varies(history, name)]


def summarize(run: Run, model: str, dataset: str) -> dict[str, Any]:
    """What summary.json says about a run; a model without a gate has no load and no entropy."""
    seconds = [record["seconds"] for record in run.history]
    names = shown(run.history)
    return rounded(
        {
            "dataset": dataset,
            "model": model,
            "parameters": run.parameters,
            **{name: run.history[-1][name] for name in SCORES},
            **{name: run.test[name] if name in names else None for name in DIAGNOSTICS},
            "seconds_per_epoch": np.median(seconds),
            "compile_seconds": run.compile_seconds,
        }
    ) | {"versions": versions()}


def forget_earlier_run(out: Path) -> None:
    """Deletes what an earlier run has left, which would seem to be this one's."""
    for name in ("metrics.jsonl", "summary.json", *PICTURES):
        (out / name).unlink(missing_ok=True)


def draw(run: Run, model: str, images: np.ndarray, out: Path) -> None:
    """Writes the pictures of one run; those of experts only where there are some."""
    from moejax import plot  # loads matplotlib, for which no epoch should wait

    save_figure(plot.curves({model: run.history}), out / "curves.png")
    save_figure(plot.confusion(run.test["confusion"], classes="digit"), out / "confusion.png")
    if "by_class" in run.test:
        names = ("epoch", *shown(run.history))
        records = [{name: record[name] for name in names} for record in run.history]
        save_figure(plot.diagnostics(records, titles=TITLES), out / "diagnostics.png")
        by_class = run.test["by_class"]
        save_figure(plot.specialisation(by_class, classes="digit"), out / "specialisation.png")
        top_expert = run.test["top_expert"]
        figure = plot.images_by_expert(images, top_expert, len(by_class))
        save_figure(figure, out / "experts.png")


def compare(runs: dict[str, Run], out: Path) -> None:
    """Prints the last epoch of every model, one under the other, and draws all epochs."""
    from moejax import plot

    figure = plot.curves({name: run.history for name, run in runs.items()})
    save_figure(figure, out / "curves.png")
    say("\nmodel    parameters  test loss  accuracy  seconds/epoch  gate entropy")
    for model, run in runs.items():
        summary = summarize(run, model, "")
        entropy = summary["gate_entropy"]
        say(
            f"{model:<8} {summary['parameters']:>10,} {summary['test_loss']:>10.4f} "
            f"{summary['test_accuracy']:>9.2%} {summary['seconds_per_epoch']:>14.2f} "
            f"{'-' if entropy is None else f'{entropy:.3f}':>13}"
        )


def print_step(records: list[ParameterStep]) -> None:
    """Prints every parameter and its gradient after zeroing, after backward, after the update."""
    zeros = np.zeros(3)
    show_phase("after zeroing", [(r, r.value, zeros) for r in records])
    show_phase("after backward", [(r, r.value, r.gradient) for r in records])
    show_phase("after the update", [(r, r.value + r.update, r.gradient) for r in records])


def show_phase(title: str, rows: list[tuple[ParameterStep, Any, Any]]) -> None:
    """Prints one row per parameter: name, shape, first values, first gradients."""
    say(f"\n{title:<32} {'shape':<14} {'first values':<32} first gradients")
    for record, value, gradient in rows:
        shape = "x".join(map(str, record.shape))
        say(f"{record.path:<32} {shape:<14} {first(value):<32} {first(gradient)}")


def first(values: Any) -> str:
    """The first three numbers of an array."""
    return " ".join(f"{value: .2e}" for value in np.ravel(values)[:3])
