"""What heads cost: the summary, the tables, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.intervals import half_width, intervals_of, shown
from studies.page import Summary, duration, table
from studies.sharpness_models import HEADS


def cell_name(head: str, batch: int) -> str:
    """The name of the cell of a head at a batch size."""
    return f"{head}-at-{batch}"


def batches(cells: Any) -> list[int]:
    """The batch sizes that were measured."""
    return sorted({int(name.rpartition("-at-")[2]) for name in cells})


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every measure with its interval."""
    return {"cells": intervals_of(measured)}


def render(summary: Summary) -> str:
    """What is counted, and what is measured."""
    every = batches(summary["cells"])
    counted = table(
        ["head", "parameters", "active for an image", "operations per image"],
        [
            [name, *(f"{cell[key]['mean']:,.0f}" for key in ("parameters", "active", "operations"))]
            for name in HEADS
            for cell in [summary["cells"][cell_name(name, every[0])]]
        ],
    )
    latency = table(
        ["microseconds per image", *(f"batch {batch:,}" for batch in every)],
        [[name, *(shown(cell["microseconds"], 2) for cell in row)] for name, row in rows(summary)],
    )
    memory = table(
        ["MB of arguments, results and temporaries", *(f"batch {batch:,}" for batch in every)],
        [
            [name, *(f"{cell['bytes']['mean'] / 1e6:.1f}" for cell in row)]
            for name, row in rows(summary)
        ],
    )
    turns = len(summary["cells"][cell_name("dense", every[0])]["microseconds"]["values"])
    return (
        f"{counted}\nOf {turns} turns each, mean and interval of their medians:\n\n{latency}\n"
        f"{memory}\n{duration(summary)}"
    )


def rows(summary: Summary) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cells of every head, by batch."""
    every = batches(summary["cells"])
    return [(name, [summary["cells"][cell_name(name, batch)] for batch in every]) for name in HEADS]


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """Latency per image and memory by batch, one point per head."""
    from moejax.plot import color, new_figure

    every = batches(summary["cells"])
    figure, axes = new_figure(1, 2, width=10, height=3.8)
    width = 0.8 / len(HEADS)
    for index, (name, row) in enumerate(rows(summary)):
        place = np.arange(len(every)) + (index - (len(HEADS) - 1) / 2) * width
        times = [cell["microseconds"] for cell in row]
        means = np.array([one["mean"] for one in times])
        half = [half_width(one) for one in times]
        look = {"marker": "o", "linestyle": "", "color": color(index)}
        axes[0, 0].errorbar(place, means, half, capsize=3, label=name, **look)
        sizes = [cell["bytes"]["mean"] / 1e6 for cell in row]
        axes[0, 1].plot(place, sizes, **look)
    for ax, label in zip(axes[0], ("microseconds per image", "MB"), strict=True):
        ax.set_xticks(range(len(every)), [f"{batch:,}" for batch in every])
        ax.set(xlabel="images per call", ylabel=label, yscale="log")
    axes[0, 0].legend(fontsize=8)
    return figure
