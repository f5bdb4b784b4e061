"""Competition and hierarchy: the summary, the tables, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.hierarchy_measures import GRID, NEAR, POINTS
from studies.intervals import intervals_of, shown
from studies.page import Summary, duration, table
from studies.regimes import truth

TOY, REGIMES, CIRCLE = "toy", "regimes", "circle"
TITLES = {"em": "EM", "one-expert": "one expert"}


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every number of every cell with its interval; curves are left to the picture."""
    return {"cells": intervals_of(measured)}


def render(summary: Summary) -> str:
    """The tables."""
    return (
        "Two linear experts on the toy, percent of test points:\n\n"
        f"{competition(summary)}\n"
        "Trees of two groups of two experts, nats per example, with their iterations until within "
        f"{NEAR} nats of their own end:\n\n{fits(summary)}\n{monotone(summary)}\n\n"
        f"{duration(summary)}"
    )


def competition(summary: Summary) -> str:
    """Experts that cooperate beside experts that compete."""
    head = [
        "experts",
        "seeds",
        "blend",
        "each point's top expert alone",
        "the better expert on all points",
        "largest gate",
    ]
    rows = []
    for name, one in cells(summary, TOY):
        percents = [shown(one[each], 1) for each in ("accuracy", "top_alone", "best_everywhere")]
        count = str(len(one["accuracy"]["values"]))
        rows.append([name, count, *percents, shown(one["confidence"], 3)])
    return table(head, rows)


def fits(summary: Summary) -> str:
    """EM beside the gradient, on both problems."""
    head = ["data", "fit", "seeds", "train nll", "test nll", "test error", "iterations, median"]
    rows = []
    for problem in (REGIMES, CIRCLE):
        for name, one in cells(summary, problem):
            error = (
                f"relative error {shown(one['relative_error'], 3)}"
                if "relative_error" in one
                else f"{shown(one['accuracy'], 1)}% right"
            )
            iterations = f"{np.median(one['converged']['values']):,.0f}"
            count = str(len(one["nll"]["values"]))
            numbers = [shown(one[each], 3) for each in ("nll", "test_nll")]
            rows.append([problem, title(name), count, *numbers, error, iterations])
    return table(head, rows)


def monotone(summary: Summary) -> str:
    """What EM promises."""
    fits = [one for name, one in summary["cells"].items() if name.endswith("-em")]
    rise = max(max(one["largest_rise"]["values"]) for one in fits)
    seeds = sum(len(one["nll"]["values"]) for one in fits)
    if rise > 0:
        return f"The negative log-likelihood rises by up to {rise:.1e} in an iteration of EM."
    return f"In no iteration of EM, over {seeds} fits, does the negative log-likelihood rise."


def cells(summary: Summary, problem: str) -> list[tuple[str, Any]]:
    """The contenders of a problem with their measures."""
    return [
        (name.removeprefix(f"{problem}-"), one)
        for name, one in summary["cells"].items()
        if name.startswith(f"{problem}-")
    ]


def title(name: str) -> str:
    """What tables and pictures call a fit, such as ``Adam 0.03``, with its rate."""
    return TITLES.get(name, name.replace("adam-", "Adam "))


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Who decides alone; a fitted tree; likelihood by iteration on both problems."""
    from moejax.plot import color, new_figure

    figure, axes = new_figure(2, 2, width=9.5, height=6.4)
    (alone, tree), curves = axes
    lowest = 65.0
    for index, (name, _) in enumerate(cells(summary, TOY)):
        one = measured[f"{TOY}-{name}"]
        blend, top = one["accuracy"], one["top_alone"]
        alone.scatter(blend, top, s=9, alpha=0.6, color=color(index), label=name)
        lowest = min(lowest, blend.min() - 1, top.min() - 1)
    limits = [lowest, 101]
    alone.plot(limits, limits, color="0.7", linewidth=1, zorder=0)
    alone.set(xlim=limits, ylim=limits, xlabel="blend right, %", ylabel="top expert alone right, %")
    alone.set_title("toy: one dot per seed", size=10)
    alone.legend(fontsize=8)
    draw_tree(tree, measured[f"{REGIMES}-em"])
    for ax, problem in zip(curves, (REGIMES, CIRCLE), strict=True):
        for index, (name, _) in enumerate(cells(summary, problem)):
            draw_curve(ax, measured[f"{problem}-{name}"], title(name), color(index))
        ax.set(xscale="log", xlabel="iteration")
        ax.set_title(f"{problem}: median and quartiles over seeds", size=10)
        ax.legend(fontsize=8)
    curves[0].set_ylabel("train nll, nats per example")
    return figure


def draw_tree(ax: Any, one: Measured) -> None:
    """The gates of the best fit, and its mean beside the true lines."""
    from moejax.plot import color

    best = int(np.argmin(one["nll"]))
    gates, low, high = one["gates"][best], -3.4, 2.2
    bottom = np.zeros(len(GRID))
    for index, gate in enumerate(gates.T):
        ax.fill_between(
            GRID,
            low + (high - low) * bottom,
            low + (high - low) * (bottom + gate),
            color=color(index),
            alpha=0.25,
            linewidth=0,
        )
        bottom = bottom + gate
    for start, end in zip([-2, -1, 0, 1], [-1, 0, 1, 2], strict=True):
        inside = np.linspace(start + 1e-6, end - 1e-6, 2)
        ax.plot(
            inside, truth(inside), color="0.2", linewidth=4, alpha=0.3, label="truth" * (start < -1)
        )
    ax.plot(GRID, one["mean"][best], color="0.1", linewidth=1.2, label="mean of the tree")
    ax.set(xlim=(-2, 2), ylim=(low, high), xlabel="x", ylabel="y")
    ax.set_title("regimes, the best fit by EM: gates in colour", size=10)
    ax.legend(fontsize=8, loc="lower left")


def draw_curve(ax: Any, one: Measured, name: str, shade: str) -> None:
    """The median over seeds, and the quartiles, from the first iteration on."""
    steps = np.rint(np.linspace(0, one["iterations"][0], POINTS + 1))
    steps, first = np.unique(steps, return_index=True)
    curve = one["curve"][:, first[1:]]
    low, middle, high = np.quantile(curve, [0.25, 0.5, 0.75], axis=0)
    ax.plot(steps[1:], middle, color=shade, label=name)
    ax.fill_between(steps[1:], low, high, color=shade, alpha=0.2, linewidth=0)
