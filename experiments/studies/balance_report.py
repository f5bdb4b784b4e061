"""Quality beside balance: the summary, the tables, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.balance_methods import METHODS
from studies.blocks import Measured
from studies.intervals import ONE_SEED, half_width, intervals_of, shown, with_interval
from studies.page import Summary, duration, table

# Wang et al. 2024, table 2: a balance loss and a balance bias in language models of 1 and 3 billion
# parameters: perplexity, and the violation of all layers over the validation set.
PUBLISHED = {
    "1B, balance loss": (9.56, 0.72),
    "1B, balance bias": (9.50, 0.04),
    "3B, balance loss": (7.97, 0.52),
    "3B, balance bias": (7.92, 0.04),
}
REFERENCE = "nothing"
COLUMNS = {  # heading: measure, digits
    "test error, %": ("error", 2),
    "cross-entropy": ("cross_entropy", 4),
    "violation": ("violation", 2),
    "experts per image": ("experts", 2),
    "images left out, %": ("left_out", 2),
}


def cell_name(method: str) -> str:
    """The name of a method's files."""
    return method.replace(",", "").replace(" ", "-").lower()


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every measure with its interval, and each error minus the reference's, seed by seed."""
    base = measured[cell_name(REFERENCE)]["error"]
    return {
        "cells": intervals_of(measured),
        "differences": {name: with_interval(one["error"] - base) for name, one in measured.items()},
        "published": PUBLISHED,
    }


def render(summary: Summary) -> str:
    """The table of ours, and the published one."""
    ours = table(
        ["method", "seeds", *COLUMNS, "error minus that of nothing"],
        [row(summary, name) for name in METHODS],
    )
    published = table(
        ["published", "perplexity", "violation"],
        [[name, f"{ppl:.2f}", f"{v:.2f}"] for name, (ppl, v) in summary["published"].items()],
    )
    return f"{ours}\n{published}\n{verdict(summary)}\n\n{duration(summary)}"


def row(summary: Summary, method: str) -> list[str]:
    """A method's line."""
    one = summary["cells"][cell_name(method)]
    difference = summary["differences"][cell_name(method)]
    return [
        method,
        str(len(one["error"]["values"])),
        *(shown(one[measure], digits) for measure, digits in COLUMNS.values()),
        "" if method == REFERENCE else shown(difference, 2),
    ]


def verdict(summary: Summary) -> str:
    """Which methods have an interval of the difference that leaves zero out."""
    others = [method for method in METHODS if method != REFERENCE]
    found = {method: summary["differences"][cell_name(method)] for method in others}
    if any(one["low"] is None for one in found.values()):
        return ONE_SEED
    better = [method for method, one in found.items() if one["high"] < 0]
    worse = [method for method, one in found.items() if one["low"] > 0]
    return (
        f"Errors below that of nothing: {'; '.join(better) or 'none'}. "
        f"Errors above it: {'; '.join(worse) or 'none'}."
    )


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Quality and balance over training, and one against the other at the end."""
    from moejax.plot import color, new_figure

    figure, axes = new_figure(1, 3, width=12, height=4.2)
    for index, method in enumerate(METHODS):
        name = cell_name(method)
        for ax, measure in zip(axes[0], ("error", "violation"), strict=False):
            curve = measured[name][f"curve_{measure}"].mean(axis=0)
            place = (np.arange(len(curve)) + 1) / len(curve)
            ax.plot(place, curve, color=color(index), label=method)
        ends = [summary["cells"][name][measure] for measure in ("violation", "error")]
        (x, across), (y, up) = ((one["mean"], half_width(one)) for one in ends)
        axes[0, 2].errorbar(x, y, up, across, marker="o", ms=5, capsize=2, color=color(index))
    axes[0, 0].set(yscale="log", ylabel="test error, %", xlabel="share of training")
    axes[0, 0].set_yticks([4, 5, 6, 8, 10, 15, 20], ["4", "5", "6", "8", "10", "15", "20"])
    axes[0, 0].minorticks_off()
    axes[0, 1].set(ylabel="violation", xlabel="share of training", ylim=(-0.15, None))
    axes[0, 2].set(xlabel="violation", ylabel="test error, %")
    for ax in axes[0, :2]:
        ax.set_title("mean over seeds", size=10)
    axes[0, 2].set_title("at the end: mean and 95% interval", size=10)
    axes[0, 0].legend(fontsize=8)
    return figure
