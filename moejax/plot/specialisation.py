"""Which expert serves what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from moejax.plot.style import new_figure


def specialisation(by_class: np.ndarray, *, classes: str = "class") -> Figure:
    """Which expert serves which class: each expert's share of the gates of each class.

    Args:
        by_class: gate mass, shape [E, classes].
        classes: what a class is, such as ``"digit"``.

    Returns:
        A figure; every column adds up to 100%, or to 0% for a class without any gate. An expert
        with less than a twentieth of an equal share of the gate is named idle.

    Example:
        >>> len(specialisation(np.ones((2, 3))).axes)
        1
    """
    share = by_class / np.maximum(by_class.sum(axis=0), 1e-12)
    figure = table(
        share,
        rows="expert",
        columns=classes,
        title=f"Share of each {classes}'s gate, by expert",
        form=lambda value: f"{100 * value:.0f}%",
    )
    names = [f"{e} (idle)" if idle else str(e) for e, idle in enumerate(idle_experts(by_class))]
    figure.axes[0].set_yticks(range(len(names)), names)
    return figure


def idle_experts(by_class: np.ndarray) -> np.ndarray:
    """Which experts have less than a twentieth of an equal share of the gate, bool [E]."""
    load = by_class.sum(axis=1)
    return load < 0.05 * load.mean()


def table(
    values: np.ndarray, *, rows: str, columns: str, title: str, form: Callable[[float], str]
) -> Figure:
    """A table of numbers as a heat map with the number in every cell.

    Args:
        values: shape [R, C].
        rows: what a row is.
        columns: what a column is.
        title: above the table.
        form: how a number is written.

    Returns:
        A figure.

    Example:
        >>> len(table(np.eye(2), rows="expert", columns="class", title="t", form=str).axes)
        1
    """
    num_rows, num_columns = values.shape
    figure, axes = new_figure(width=1.6 + 0.55 * num_columns, height=1.3 + 0.42 * num_rows)
    ax = axes[0, 0]
    lightest = min(values.min(), 0)
    ax.imshow(values, cmap="Blues", aspect="auto", vmin=lightest)
    dark = (lightest + values.max()) / 2
    for (r, c), value in np.ndenumerate(values):
        color = "white" if value > dark else "#222222"
        ax.text(c, r, form(value), ha="center", va="center", color=color, fontsize=8)
    ax.set(xlabel=columns, ylabel=rows, title=title)
    ax.set_xticks(range(num_columns))
    ax.set_yticks(range(num_rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def images_by_expert(images: np.ndarray, top: np.ndarray, num_experts: int) -> Figure:
    """The first images that each expert has the largest gate for.

    Args:
        images: shape [N, H, W].
        top: the expert with the largest gate for each image, shape [N].
        num_experts: E, how many there are.

    Returns:
        A figure with one row per expert; the row of an expert that serves no image says so.

    Raises:
        ValueError: if there is no image.

    Example:
        >>> len(images_by_expert(np.ones((3, 2, 2)), np.zeros(3), 2).axes)
        2
    """
    if not len(images):
        raise ValueError("`images_by_expert` needs at least one image, got none.")
    figure, axes = new_figure(num_experts, width=8.6, height=0.72 * num_experts)
    for expert, (ax,) in enumerate(axes):
        own = np.flatnonzero(top == expert)
        ax.imshow(_in_a_row(images, own[:12], 12), cmap="gray_r", vmin=0, vmax=images.max())
        ax.axis("off")
        label = f"expert {expert}\n{len(own) / len(top):.1%}"
        beside = {"va": "center", "fontsize": 8, "transform": ax.transAxes}
        ax.text(-0.01, 0.5, label, ha="right", **beside)
        if not len(own):
            ax.text(0, 0.5, "has the largest gate for no image", color="#666666", **beside)
    return figure


def _in_a_row(images: np.ndarray, indices: np.ndarray, room: int) -> np.ndarray:
    """Some images side by side, with gaps between them, in a row with room for ``room`` images."""
    _, height, width = images.shape
    gap = width // 6
    row = np.zeros((height, room, width + gap), images.dtype)
    row[:, : len(indices), :width] = images[indices].transpose(1, 0, 2)
    return row.reshape(height, -1)[:, : -gap or None]
