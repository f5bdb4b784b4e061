"""Chen et al.'s numbers beside ours: the summary, the tables, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.clusters_data import CLUSTERS, SETTINGS
from studies.clusters_training import EVERY
from studies.curves import mean_and_range
from studies.intervals import half_width, intervals_of, shown, shown_with_deviation
from studies.page import Summary, duration, table

# The outputs stored in the authors' notebooks synthetic_demo_s1 to s4: ten runs of a mixture, with
# standard deviations, and one run of a single network.
PUBLISHED: dict[str, dict[str, tuple[float, float | None]]] = {
    "1-nonlinear": {"accuracy": (99.46, 0.55), "entropy": (0.098, 0.088)},
    "1-linear": {"accuracy": (93.0, 2.11), "entropy": (1.300, 0.044)},
    "1-single-nonlinear": {"accuracy": (79.57, None)},
    "1-single-linear": {"accuracy": (68.31, None)},
    "2-nonlinear": {"accuracy": (98.1, 1.56), "entropy": (0.183, 0.144)},
    "2-linear": {"accuracy": (89.49, 1.35), "entropy": (1.262, 0.095)},
    "2-single-nonlinear": {"accuracy": (77.38, None)},
    "2-single-linear": {"accuracy": (68.22, None)},
    "3-nonlinear": {"accuracy": (99.99, 0.02), "entropy": (0.008, 0.011)},
    "3-linear": {"accuracy": (95.93, 1.34), "entropy": (1.160, 0.100)},
    "3-single-nonlinear": {"accuracy": (73.72, None)},
    "3-single-linear": {"accuracy": (74.30, None)},
    "4-nonlinear": {"accuracy": (98.92, 1.18), "entropy": (0.089, 0.120)},
    "4-linear": {"accuracy": (93.3, 1.48), "entropy": (1.160, 0.155)},
    "4-single-nonlinear": {"accuracy": (70.26, None)},
    "4-single-linear": {"accuracy": (74.28, None)},
}
CONTENDERS = {
    "nonlinear": "eight cubic experts",
    "linear": "eight linear experts",
    "single-nonlinear": "one cubic network",
    "single-linear": "one linear network",
}
DIGITS = {"accuracy": 2, "entropy": 3}


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every measure of every cell with its interval, beside what was published."""
    return {
        "cells": intervals_of(measured),
        "published": {
            name: {
                measure: {"mean": mean, "sd": sd} for measure, (mean, sd) in PUBLISHED[name].items()
            }
            for name in measured
        },
    }


def render(summary: Summary) -> str:
    """Two tables, and which goals were reached."""
    accuracies = table(
        ["setting", "network", "seeds", "published", "ours", "ours, without noise in the test"],
        [accuracy_row(summary, name) for name in ordered(summary)],
    )
    entropies = table(
        ["setting", "network", "published", "ours", "steps"],
        [
            [
                *place(name),
                published(summary, name, "entropy"),
                ours(summary, name, "entropy"),
                shown(summary["cells"][name]["steps"], 0),
            ]
            for name in ordered(summary)
            if "entropy" in summary["cells"][name]
        ],
    )
    return (
        f"Test accuracy in percent:\n\n{accuracies}\nDispatch entropy in nats, and steps taken:\n\n"
        f"{entropies}\n{verdict(summary)}\n\n{duration(summary)}"
    )


def ordered(summary: Summary) -> list[str]:
    """The cells by setting, then by contender."""
    contenders = list(CONTENDERS)
    parts = [name.partition("-")[::2] for name in summary["cells"]]
    parts.sort(key=lambda part: (part[0], contenders.index(part[1])))
    return ["-".join(part) for part in parts]


def accuracy_row(summary: Summary, name: str) -> list[str]:
    """A line of the table of accuracies."""
    measures = summary["cells"][name]
    without = "accuracy_without_noise"
    return [
        *place(name),
        str(len(measures["accuracy"]["values"])),
        published(summary, name, "accuracy"),
        ours(summary, name, "accuracy"),
        shown(measures[without], 2) if without in measures else "",
    ]


def place(name: str) -> list[str]:
    """The setting and the network of a cell."""
    setting, _, contender = name.partition("-")
    return [setting, CONTENDERS[contender]]


def published(summary: Summary, name: str, measure: str) -> str:
    """What was published, with its standard deviation."""
    one, digits = summary["published"][name][measure], DIGITS[measure]
    spread = "" if one["sd"] is None else f" ± {one['sd']:.{digits}f}"
    return f"{one['mean']:.{digits}f}{spread}"


def ours(summary: Summary, name: str, measure: str) -> str:
    """What we found: mean, standard deviation and interval."""
    return shown_with_deviation(summary["cells"][name][measure], DIGITS[measure])


def verdict(summary: Summary) -> str:
    """Which means are within one published standard deviation of the published mean."""
    goals = [
        (name, measure, one)
        for name, measures in summary["published"].items()
        for measure, one in measures.items()
        if one["sd"] is not None
    ]
    missed = [
        missing(summary, name, measure)
        for name, measure, one in goals
        if abs(summary["cells"][name][measure]["mean"] - one["mean"]) > one["sd"]
    ]
    reached = len(goals) - len(missed)
    text = (
        f"{reached} of {len(goals)} means of mixtures are within one published standard deviation "
        "of the published mean."
    )
    return text + (f" Not within it: {'; '.join(missed)}." if missed else "")


def missing(summary: Summary, name: str, measure: str) -> str:
    """A mean that is not within its goal, with the range and median of the seeds behind it."""
    setting, network = place(name)
    values, digits = summary["cells"][name][measure]["values"], DIGITS[measure]
    # Adding zero turns a -0 that rounding has left into 0.
    low, middle, high = np.round(np.quantile(values, [0, 0.5, 1]), digits) + 0.0
    return (
        f"{measure} of {network} in setting {setting} "
        f"(seeds from {low:.{digits}f} to {high:.{digits}f}, median {middle:.{digits}f})"
    )


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Accuracy with intervals beside the published one, and the entropy as routers learn."""
    from moejax.plot import color, new_figure

    settings = sorted({name.partition("-")[0] for name in summary["cells"]})
    figure, axes = new_figure(2, len(settings), width=2.6 * len(settings) + 1, height=5.4)
    shades = {contender: color(index) for index, contender in enumerate(CONTENDERS)}
    trained = {name.partition("-")[2] for name in summary["cells"]}
    labels = {name: text for name, text in CONTENDERS.items() if name in trained}
    least = min(lowest(one["accuracy"]) for one in summary["cells"].values())
    for column, setting in enumerate(settings):
        top, bottom = axes[:, column]
        noise, distractor = SETTINGS[int(setting)].noise, SETTINGS[int(setting)].distractor[1]
        top.set_title(f"setting {setting}: noise {noise:g}, distractor to {distractor:g}", size=9)
        for place, contender in enumerate(labels):
            name = f"{setting}-{contender}"
            if name in summary["cells"]:
                draw_accuracy(top, place, summary, name, shades[contender])
            if "curve" in measured.get(name, {}):
                curves = measured[name]["curve"]
                steps = EVERY * np.arange(curves.shape[1])
                mean_and_range(bottom, steps, curves, color=shades[contender], label=contender)
        top.set(ylim=(min(60, least - 1), 101.5), xlim=(-0.6, len(labels) - 0.4))
        ticks = [text.replace(" ", "\n") for text in labels.values()]
        top.set_xticks(range(len(labels)), ticks, size=7)
        bottom.set(xlabel="step", ylim=(-0.05, 1.5))
        bottom.axhline(np.log(CLUSTERS), color="0.7", linestyle=":", linewidth=1)
        bottom.text(0, np.log(CLUSTERS), f"log {CLUSTERS}", size=7, color="0.5", va="bottom")
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel("dispatch entropy, nats")
    meanings = axes[0, 0].get_legend_handles_labels()
    figure.legend(*meanings, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure


def lowest(one: dict[str, Any]) -> float:
    """What is drawn lowest of an accuracy over seeds."""
    return min(*one["values"], one["mean"] - bar(one)[0][0])


def bar(one: dict[str, Any]) -> list[list[float]]:
    """How far the interval reaches below and above the mean, where there are accuracies."""
    half = half_width(one)
    return [[min(half, one["mean"])], [min(half, 100 - one["mean"])]]


def draw_accuracy(ax: Any, place: int, summary: Summary, name: str, shade: str) -> None:
    """Every seed, the mean with its interval, and the published mean with its deviation."""
    one, theirs = summary["cells"][name]["accuracy"], summary["published"][name]["accuracy"]
    first = place == 0
    values = one["values"]
    ax.scatter(
        place - 0.3 + 0 * np.array(values),
        values,
        s=6,
        color=shade,
        alpha=0.4,
        linewidth=0,
        label="one seed" if first else None,
    )
    ax.errorbar(
        place,
        one["mean"],
        bar(one),
        fmt="o",
        ms=4,
        color=shade,
        label="mean, 95% interval" if first else None,
    )
    ax.errorbar(
        place + 0.3,
        theirs["mean"],
        theirs["sd"] or 0,
        fmt="D",
        ms=4,
        color="0.4",
        label="published, ± sd" if first else None,
    )
