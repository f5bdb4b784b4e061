"""How routing changes in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moejax.plot.style import color, new_figure

COLUMNS = 3


def diagnostics(history: Sequence[Mapping[str, Any]]) -> Figure:
    """What `moejax.diagnostics` says per epoch: a panel for each quantity.

    Args:
        history: one record per epoch: ``epoch``, and quantities by name. A number is drawn as one
            line; an array [E], such as the load, as one line per expert.

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
    names = [name for name in (history[0] if history else ()) if name != "epoch"]
    if not names:
        raise ValueError("There is nothing to draw: give at least one record with a quantity.")
    rows = -(-len(names) // COLUMNS)
    figure, axes = new_figure(rows, min(len(names), COLUMNS), width=9, height=2.6 * rows)
    epochs = [record["epoch"] for record in history]
    for ax in axes.ravel()[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.ravel(), names, strict=False):
        lines = np.array([np.atleast_1d(record[name]) for record in history]).T  # [E or 1, epochs]
        for index, line in enumerate(lines):
            ax.plot(epochs, line, marker="o", markersize=3, color=color(index), label=index)
        ax.update_datalim([(epochs[0], 0)])  # so that a line that hardly moves has room above it
        ax.set(xlabel="epoch", title=name.replace("_", " "), ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    _name_experts(figure)
    return figure


def _name_experts(figure: Figure) -> None:
    handles, names = max(
        (ax.get_legend_handles_labels() for ax in figure.axes), key=lambda h: len(h[0])
    )
    if len(handles) > 1:  # one line is no expert's
        figure.legend(handles, names, title="expert", loc="outside right upper", frameon=False)
