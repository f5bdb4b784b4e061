"""The picture of the study of heads: errors by epoch, accuracies at the end, loads."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.curves import mean_and_range
from studies.heads import EXPERTS, shade
from studies.intervals import half_width
from studies.page import Summary

BLENDED = {"marker": "D", "linestyle": "none", "fillstyle": "none", "markersize": 5}


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Three panels."""
    from moejax.plot import new_figure

    figure, [axes] = new_figure(1, 3, width=12, height=3.6)
    draw_errors(axes[0], measured)
    draw_accuracies(axes[1], summary)
    draw_loads(axes[2], measured)
    return figure


def draw_errors(ax: Any, measured: dict[str, Measured]) -> None:
    """By epoch: the mean over seeds, and their range."""
    for name, one in measured.items():
        errors = 100 - one["accuracy"]
        epochs = np.arange(1, errors.shape[1] + 1)
        mean_and_range(ax, epochs, errors, color=shade(name), label=name)
    ax.set(yscale="log", xlabel="epoch", ylabel="test error, percent")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title("mean and range over seeds", size=10)
    ax.legend(fontsize=8)


def draw_accuracies(ax: Any, summary: Summary) -> None:
    """After the last epoch: seeds, mean and interval, mean over shifts; the published in grey."""
    heads = summary["cells"]
    for place, (name, one) in enumerate(heads.items()):
        found = one["accuracy"]
        ax.plot([place - 0.15] * len(found["values"]), found["values"], ".", color=shade(name))
        ax.errorbar(place, found["mean"], half_width(found), fmt="o", capsize=3, color=shade(name))
        ax.plot(place + 0.13, one["blended"]["mean"], **BLENDED, color=shade(name))
    published = [summary["published"][name] for name in heads]
    places = np.arange(len(heads)) + 0.26
    ax.plot([], [], **BLENDED, color="0.5", label="over nine shifts, mean")
    ax.plot(places, published, "s", color="0.5", fillstyle="none", label="published, validation")
    ax.set(xlim=(-0.5, len(heads) - 0.5), ylabel="accuracy, percent")
    ax.set_xticks(range(len(heads)), list(heads))
    ax.set_title("last epoch: seeds, mean and 95%", size=10)
    ax.legend(fontsize=8)


def draw_loads(ax: Any, measured: dict[str, Measured]) -> None:
    """Of sparse heads: experts from the most to the least used, each seed a line."""
    for name, one in measured.items():
        if "load" in one:
            ranked = -np.sort(-one["load"][:, -1])
            lines = ax.plot(np.arange(1, EXPERTS + 1), ranked.T, ".-", color=shade(name))
            lines[0].set_label(name)
    ax.axhline(1 / EXPERTS, color="0.5", linewidth=0.8, linestyle="--", label="even")
    ax.set(ylim=(0, None), xlabel="experts by load", ylabel="share of the choices on test images")
    ax.set_title("last epoch: loads, a line for each seed", size=10)
    ax.legend(fontsize=8)
