"""The decision boundaries of a mixture on the plane: each expert, the gate, the whole model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moejax.plot.style import color, new_figure

CLASS_MARKS = (("#5c5c5c", "x"), ("#111111", "."))  # label 0, label 1


class Plane(NamedTuple):
    """A mixture evaluated on a grid of points.

    Attributes:
        x: first coordinates, shape [W].
        y: second coordinates, shape [H].
        experts: the score of each expert, shape [E, H, W]; its boundary is at zero.
        gates: the gate of each expert, shape [E, H, W].
        probability: of label 1 by the whole model, shape [H, W].
    """

    x: np.ndarray
    y: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    probability: np.ndarray


def grid(points: np.ndarray, *, size: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid that covers the points with a margin.

    Args:
        points: shape [N, 2].
        size: grid points along each axis.

    Returns:
        First coordinates [size], second coordinates [size], and all points [size * size, 2].

    Example:
        >>> x, y, both = grid(np.array([[0.0, 0.0], [1.0, 2.0]]), size=3)
        >>> both.shape
        (9, 2)
    """
    low, high = points.min(axis=0) - 0.4, points.max(axis=0) + 0.4
    x, y = (np.linspace(a, b, size) for a, b in zip(low, high, strict=True))
    first, second = np.meshgrid(x, y)
    return x, y, np.stack([first.ravel(), second.ravel()], axis=-1)


def data(points: np.ndarray, labels: np.ndarray) -> Figure:
    """The points, marked by label.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].

    Returns:
        A figure.

    Example:
        >>> len(data(np.zeros((2, 2)), np.array([0, 1])).axes)
        1
    """
    figure, axes = new_figure(width=5.4, height=3.8)
    draw_points(axes[0, 0], points, labels)
    axes[0, 0].set_title(f"{len(points):,} points")
    return figure


def boundaries(points: np.ndarray, labels: np.ndarray, plane: Plane) -> Figure:
    """Four panels: the data, the line of each expert, the gate's regions, the model's boundary.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        plane: the mixture on a grid.

    Returns:
        A figure.

    Example:
        >>> x, y, _ = grid(np.zeros((1, 2)), size=4)
        >>> slope = np.add.outer(y, x)
        >>> plane = Plane(x, y, slope[None], np.ones((1, 4, 4)), 0.5 + slope)
        >>> len(boundaries(np.zeros((2, 2)), np.array([0, 1]), plane).axes)
        4
    """
    figure, axes = new_figure(2, 2, width=9, height=5.6)
    panels = (
        ("The data", lambda ax: None),
        ("Each expert's line, where its score is 0", lambda ax: draw_experts(ax, plane)),
        ("The gate: which expert has the largest share", lambda ax: draw_gate(ax, plane)),
        ("The mixture: boundary at probability 1/2", lambda ax: draw_model(ax, plane)),
    )
    for ax, (title, draw) in zip(axes.flat, panels, strict=True):
        draw(ax)
        draw_points(ax, points, labels)
        ax.set(title=title, xlim=plane.x[[0, -1]], ylim=plane.y[[0, -1]])
    axes[0, 1].legend(handles=_expert_handles(len(plane.experts)), loc="lower left", fontsize=8)
    return figure


def boundary_frame(points: np.ndarray, labels: np.ndarray, plane: Plane, *, title: str) -> Figure:
    """One panel with everything: the data, the line of each expert, the model's boundary.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        plane: the mixture on a grid.
        title: above the panel.

    Returns:
        A figure.

    Example:
        >>> x, y, _ = grid(np.zeros((1, 2)), size=4)
        >>> slope = np.add.outer(y, x)
        >>> plane = Plane(x, y, slope[None], np.ones((1, 4, 4)), 0.5 + slope)
        >>> len(boundary_frame(np.zeros((2, 2)), np.array([0, 1]), plane, title="step 0").axes)
        1
    """
    figure, axes = new_figure(width=5.4, height=3.2)
    ax = axes[0, 0]
    draw_model(ax, plane)
    draw_points(ax, points, labels)
    draw_experts(ax, plane)
    ax.legend(handles=_expert_handles(len(plane.experts)), loc="lower left", fontsize=8)
    ax.set(title=title, xlim=plane.x[[0, -1]], ylim=plane.y[[0, -1]])
    return figure


def draw_points(ax: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    """Draws points marked by label, and says which mark is which."""
    for label, (shade, marker) in enumerate(CLASS_MARKS):
        own = points[labels == label]
        ax.scatter(own[:, 0], own[:, 1], s=10, c=shade, marker=marker, linewidths=0.7, alpha=0.75)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    handles = [
        Line2D([], [], color=shade, marker=marker, linestyle="", label=f"label {label}")
        for label, (shade, marker) in enumerate(CLASS_MARKS)
    ]
    ax.add_artist(ax.legend(handles=handles, loc="upper right", fontsize=8))


def draw_experts(ax: Axes, plane: Plane) -> None:
    """Draws the line where each expert's score is zero."""
    for expert, scores in enumerate(plane.experts):
        _contour(ax, plane, scores, 0.0, color(expert))


def draw_gate(ax: Axes, plane: Plane) -> None:
    """Shades each point by the expert with the largest gate, paler where the gate is undecided."""
    best = plane.gates.argmax(axis=0)  # [H, W]
    shades = ListedColormap([color(e) for e in range(len(plane.gates))])
    extent = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    uniform = 1 / len(plane.gates)
    certainty = (plane.gates.max(axis=0) - uniform) / max(1 - uniform, 1e-9)
    ax.imshow(
        best,
        cmap=shades,
        vmin=-0.5,
        vmax=len(plane.gates) - 0.5,
        origin="lower",
        extent=extent,
        alpha=0.12 + 0.43 * np.clip(certainty, 0, 1),
        interpolation="nearest",
    )


def draw_model(ax: Axes, plane: Plane) -> None:
    """Shades the probability of label 1 and draws the boundary at one half."""
    extent = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    ax.imshow(
        plane.probability,
        cmap="PuOr",
        vmin=0,
        vmax=1,
        origin="lower",
        extent=extent,
        alpha=0.5,
        interpolation="bilinear",
    )
    _contour(ax, plane, plane.probability, 0.5, "#222222")


def _contour(ax: Axes, plane: Plane, values: np.ndarray, level: float, shade: str) -> None:
    # A line that misses the plane has no contour, and asking for it would warn.
    if values.min() < level < values.max():
        ax.contour(plane.x, plane.y, values, levels=[level], colors=[shade], linewidths=2)


def _expert_handles(num_experts: int) -> list[Line2D]:
    return [
        Line2D([], [], color=color(e), linewidth=2, label=f"expert {e}") for e in range(num_experts)
    ]
