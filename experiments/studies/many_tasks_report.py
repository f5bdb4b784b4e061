"""Loss against the correlation of two tasks: the summary, the table, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.intervals import half_width, shown, with_interval
from studies.many_tasks_data import NOISE
from studies.many_tasks_training import MODELS
from studies.page import Summary, duration, table

NAMES = [name.replace("-", " ") for name in MODELS]
BETTER = [("shared-bottom", "multi-gate"), ("one-gate", "multi-gate")]  # worse, better


def cell_name(model: str, correlation: float) -> str:
    """The name of the cell of a model at a correlation."""
    return f"{model}-at-{written(correlation)}"


def written(correlation: float) -> str:
    """Every digit, so that no two are written alike."""
    return str(correlation).removesuffix(".0")


def correlations(cells: Any) -> list[float]:
    """The correlations that were measured."""
    return sorted({float(name.rpartition("-at-")[2]) for name in cells})


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every loss with its interval, and how much lower a gate per task makes it, seed by seed."""
    every = correlations(measured)
    return {
        "cells": {name: {"loss": with_interval(one["loss"])} for name, one in measured.items()},
        "differences": {
            f"{worse} minus {better}": {
                written(p): with_interval(
                    measured[cell_name(worse, p)]["loss"] - measured[cell_name(better, p)]["loss"]
                )
                for p in every
            }
            for worse, better in BETTER
        },
    }


def render(summary: Summary) -> str:
    """The table of losses, the table of differences, and what they say of the paper's claims."""
    every = correlations(summary["cells"])
    losses = table(
        ["correlation", "seeds", *NAMES],
        [
            [
                written(p),
                str(len(summary["cells"][cell_name("one-gate", p)]["loss"]["values"])),
                *(shown(summary["cells"][cell_name(model, p)]["loss"], 4) for model in MODELS),
            ]
            for p in every
        ],
    )
    differences = table(
        ["correlation", *(name.replace("-", " ") for name in summary["differences"])],
        [
            [written(p), *(shown(one[written(p)], 4) for one in summary["differences"].values())]
            for p in every
        ],
    )
    return (
        f"Test mean squared error, of which {NOISE**2:g} is noise:\n\n{losses}\nDifferences, seed "
        f"by seed:\n\n{differences}\n{verdict(summary)}\n\n"
        f"{duration(summary)}"
    )


def verdict(summary: Summary) -> str:
    """Where the interval of a difference leaves zero out."""
    return " ".join(sentence(name, one) for name, one in summary["differences"].items())


def sentence(name: str, by_correlation: dict[str, Any]) -> str:
    """What a row of differences shows."""
    worse, _, better = name.replace("-", " ").partition(" minus ")
    sure = [p for p, one in by_correlation.items() if one["low"] is not None and one["low"] > 0]
    against = [p for p, one in by_correlation.items() if one["low"] is not None and one["high"] < 0]
    text = (
        f"{better.capitalize()} beats {worse} at correlations {', '.join(sure)}"
        if sure
        else f"{better.capitalize()} is not shown to beat {worse} at any correlation"
    )
    return text + (f", and loses to it at {', '.join(against)}." if against else ".")


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Loss by correlation with intervals, and training at the least and the largest one."""
    from moejax.plot import color, new_figure

    every = correlations(summary["cells"])
    figure, axes = new_figure(1, 3, width=11, height=3.6)
    for index, model in enumerate(MODELS):
        cells = [summary["cells"][cell_name(model, p)]["loss"] for p in every]
        means = np.array([one["mean"] for one in cells])
        half = [half_width(one) for one in cells]
        axes[0, 0].errorbar(
            every, means, half, marker="o", ms=4, capsize=3, color=color(index), label=NAMES[index]
        )
        for ax, p in zip(axes[0, 1:], (every[0], every[-1]), strict=True):
            curve = measured[cell_name(model, p)]["curve"]
            place = np.linspace(0, 1, curve.shape[1])
            ax.plot(place, curve.mean(axis=0), color=color(index))
            low, high = np.quantile(curve, [0.25, 0.75], axis=0)
            ax.fill_between(place, low, high, color=color(index), alpha=0.2, linewidth=0)
            ax.set(yscale="log", xlabel="share of training", ylabel="training loss")
            ax.set_title(f"correlation {written(p)}: mean, quartiles", size=10)
    axes[0, 0].set(xlabel="correlation of the tasks", ylabel="test mean squared error")
    axes[0, 0].set_title("mean and 95% interval", size=10)
    axes[0, 0].legend(fontsize=8)
    return figure
