"""Pictures of the comparison with PyTorch, as matplotlib figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from moejax import plot

PYTORCH, MOEJAX = plot.color(1), plot.color(0)


def overlay(title: str, runs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Loss curves of both frameworks over each other, and under them how far apart they are.

    Args:
        title: of the figure.
        runs: PyTorch's and moejax's loss of every step, by precision.
    """
    figure, axes = plot.new_figure(2, len(runs), width=4.5 * len(runs), height=5)
    for (above, below), (name, (theirs, ours)) in zip(axes.T, runs.items(), strict=True):
        steps = np.arange(1, len(theirs) + 1)
        above.plot(steps, theirs, color=PYTORCH, linewidth=4, alpha=0.45, label="PyTorch")
        above.plot(steps, ours, color=MOEJAX, linewidth=1.2, linestyle="--", label="moejax")
        above.set(title=name, ylabel="training loss")
        above.legend(frameon=False)
        gap = np.abs(np.asarray(theirs, np.float64) - np.asarray(ours, np.float64))
        # The difference of equal losses has no logarithm; they are left out, and the axis says so.
        equal = np.mean(gap == 0)
        below.semilogy(steps[gap > 0], gap[gap > 0], ".", markersize=3, color="black")
        decades(below, gap[gap > 0])
        below.set(xlabel=f"step ({equal:.0%} of the losses are equal)", ylabel="|difference|")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def decades(axis: Any, values: np.ndarray) -> None:
    """Limits a logarithmic axis to whole powers of ten around the values."""
    if len(values):
        low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
        axis.set_ylim(10.0**low, 10.0 ** max(high, low + 2))
    axis.yaxis.set_minor_formatter(NullFormatter())


def seeds(accuracies: dict[str, np.ndarray], p_value: float) -> Figure:
    """Cumulative distributions of the accuracy over seeds.

    Args:
        accuracies: of every seed, by what was run.
        p_value: of the Kolmogorov-Smirnov test between the first and the last.
    """
    figure, axes = plot.new_figure(width=6.5, height=4.8)
    axis = axes[0, 0]
    styles = [(PYTORCH, 5, "-", 0.45), (MOEJAX, 1.5, "--", 1.0), (plot.color(2), 1.5, "-", 1.0)]
    for (name, values), (tint, width, style, alpha) in zip(
        accuracies.items(), styles, strict=False
    ):
        label = f"{name}, median {np.median(values):.1%}"
        axis.ecdf(values, color=tint, linewidth=width, linestyle=style, alpha=alpha, label=label)
    axis.set(
        xlabel="accuracy after training",
        ylabel="share of seeds at most as accurate",
        title=f"{len(values)} seeds of the toy; own weights: Kolmogorov-Smirnov p = {p_value:.2g}",
    )
    figure.legend(frameon=False, loc="outside lower center")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def speed(races: dict[str, dict[str, Any]]) -> Figure:
    """One bar per contender, its median time, side by side for every model.

    Args:
        races: records of `races.race`, by model, with the number of steps that were timed.
    """
    figure, axes = plot.new_figure(1, len(races), width=3.4 * len(races), height=3.2)
    for axis, (model, record) in zip(axes[0], races.items(), strict=True):
        names = list(record["median"])
        times = [record["median"][name] for name in names]
        tints = [MOEJAX if name == "moejax" else PYTORCH for name in names]
        bars = axis.barh(range(len(names)), times, color=tints)
        axis.bar_label(bars, [f" {time:.3g} s" for time in times])
        axis.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names])
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set(title=model, xlabel=f"seconds for {record['steps']:,} steps")
        axis.spines[["top", "right"]].set_visible(False)
    return figure
