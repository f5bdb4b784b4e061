"""How routing changes during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from moejax.plot.style import WHOLE_MODEL, color, new_figure

COLUMNS = 3
MOST_TICKS = 8
WIDTH_OF_NAME, HEIGHT_OF_NAME, ROOM_OF_TITLE = 0.8, 0.21, 0.4  # of the legend, in inches
SHARE, NATS, COUNT = "share", "nats", "number of experts"
UNITS = MappingProxyType(
    {
        "gate_entropy": NATS,
        "mutual_information": NATS,
        "confidence": SHARE,
        "share_dropped": SHARE,
        "expert_load": SHARE,
        "choice_load": SHARE,
        "effective_experts": COUNT,
        "dead_experts": COUNT,
    }
)


def diagnostics(
    history: Sequence[Mapping[str, Any]], *, titles: Mapping[str, str] | None = None
) -> Figure:
    """What the diagnostics say per epoch: a panel for each quantity.

    Args:
        history: one record per epoch: ``epoch``, and quantities by name. A number is drawn as one
            line of the whole model; an array [E], such as the load, as one line per expert.
        titles: for quantities whose name does not say enough.

    Returns:
        A figure.

    Raises:
        ValueError: if there is no quantity to draw.

    Example:
        >>> records = [dict(epoch=1, gate_entropy=0.7, expert_load=np.array([0.4, 0.6]))]
        >>> figure = diagnostics(records)
        >>> [axes.get_title() for axes in figure.axes if axes.get_visible()]
        ['gate entropy', 'expert load']
        >>> [text.get_text() for text in figure.legends[0].texts]
        ['0', '1']
    """
    names = list(dict.fromkeys(name for record in history for name in record if name != "epoch"))
    if not names:
        raise ValueError("There is nothing to draw: give at least one record with a quantity.")
    rows = -(-len(names) // COLUMNS)
    columns = min(len(names), COLUMNS)
    figure, axes = new_figure(rows, columns, width=3.2 * columns, height=2.7 * rows)
    num_experts = max(np.size(record[name]) for record in history for name in record)
    for ax in axes.ravel()[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.ravel(), names, strict=False):
        _draw(ax, [record for record in history if name in record], name, num_experts)
        epoch_axis(ax, [record["epoch"] for record in history])
        ax.set_title((titles or {}).get(name, name.replace("_", " ")), fontsize=10)
    _name_experts(figure)
    return figure


def epoch_axis(ax: Axes, epochs: Sequence[float]) -> None:
    """Whole epochs along the axis, with room for the marks of the first and the last."""
    ax.set(xlabel="epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    few = max(epochs) - min(epochs) < MOST_TICKS  # a locator puts fractions beside a single epoch
    ax.xaxis.set_major_locator(
        FixedLocator(range(int(min(epochs)), int(max(epochs)) + 1))
        if few
        else MaxNLocator(MOST_TICKS, integer=True)
    )
    ax.grid(alpha=0.3)


def _draw(ax: Axes, history: Sequence[Mapping[str, Any]], name: str, num_experts: int) -> None:
    epochs = [record["epoch"] for record in history]
    lines = np.array([np.atleast_1d(record[name]) for record in history]).T  # [E or 1, epochs]
    for index, line in enumerate(lines):
        shade = color(index) if len(lines) > 1 else WHOLE_MODEL
        ax.plot(epochs, line, marker="o", markersize=4, color=shade, label=index, clip_on=False)
    unit = UNITS.get(name, "")
    known = lines[np.isfinite(lines)]
    lowest, highest = known.min(initial=0.0), known.max(initial=0.0)
    room = 0.08 * (highest - lowest) or 1
    above = highest > 0 or lowest == 0
    ax.set(ylabel=unit, ylim=(lowest - room * (lowest < 0), highest + room * above))
    if unit == COUNT:
        ax.set_ylim(0, max(1.08 * highest, num_experts, 1))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if unit == SHARE:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _name_experts(figure: Figure) -> None:
    handles, names = max(
        (ax.get_legend_handles_labels() for ax in figure.axes), key=lambda h: len(h[0])
    )
    if len(handles) < 2:  # one line is the whole model's
        return
    width, height = figure.get_size_inches()
    columns = -(-len(names) // int((height - ROOM_OF_TITLE) / HEIGHT_OF_NAME))
    figure.set_size_inches(width + (columns - 1) * WIDTH_OF_NAME, height)
    figure.legend(
        handles,
        names,
        title="expert",
        loc="outside right upper",
        frameon=False,
        ncols=columns,
        columnspacing=1,
    )
