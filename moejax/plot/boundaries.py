"""The decision boundaries of a mixture on the plane: each expert, the gate, the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moejax.plot._plane import (
    Plane,
    add_key,
    draw_boundary,
    draw_experts,
    draw_gate,
    draw_points,
    draw_probability,
    draw_truth,
)
from moejax.plot.style import new_figure, pixels


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


def data(points: np.ndarray, labels: np.ndarray, *, truth: np.ndarray | None = None) -> Figure:
    """The points, marked by label.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        truth: the curve that separates the labels, shape [M, 2], where it is known.

    Returns:
        A figure.

    Example:
        >>> len(data(np.zeros((2, 2)), np.array([0, 1])).axes)
        1
    """
    figure, axes = new_figure(width=6, height=4)
    ax, (x, y, _) = axes[0, 0], grid(points, size=2)
    draw_points(ax, points, labels)
    draw_truth(ax, truth)
    ax.set(title=f"{len(points):,} points", xlim=x, ylim=y)
    add_key(figure, 0, truth, model=False)
    return figure


def boundaries(
    points: np.ndarray, labels: np.ndarray, plane: Plane, *, truth: np.ndarray | None = None
) -> Figure:
    """Four panels: the data, the line of each expert, the gate's regions, the model's boundary.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        plane: the mixture on a grid.
        truth: the curve that separates the labels, shape [M, 2], where it is known.

    Returns:
        A figure; its last axes are the scale of the shades.

    Example:
        >>> x, y, _ = grid(np.zeros((1, 2)), size=4)
        >>> slope = np.add.outer(y, x)
        >>> plane = Plane(x, y, slope[None], np.ones((1, 4, 4)), 0.5 + slope)
        >>> len(boundaries(np.zeros((2, 2)), np.array([0, 1]), plane).axes)
        5
    """
    figure, axes = new_figure(2, 2, width=9, height=6)
    titles = (
        "The data",
        "Each expert's line, where its output is 0",
        "The gate: colour of the expert with the largest share",
        "The mixture: its boundary, at probability 1/2",
    )
    draw_experts(axes[0, 1], plane)
    draw_gate(axes[1, 0], plane)
    shades = draw_probability(axes[1, 1], plane)
    draw_boundary(axes[1, 1], plane)
    for ax, title in zip(axes.flat, titles, strict=True):
        draw_points(ax, points, labels)
        draw_truth(ax, truth)
        ax.set(xlim=plane.x[[0, -1]], ylim=plane.y[[0, -1]])
        ax.set_title(title, fontsize=10)
        ax.label_outer()  # all panels show the same plane
    figure.colorbar(shades, ax=axes[1, 1], shrink=0.68, label="probability of label 1")
    add_key(figure, len(plane.experts), truth, model=True)
    return figure


def boundary_frame(
    points: np.ndarray,
    labels: np.ndarray,
    plane: Plane,
    *,
    title: str,
    truth: np.ndarray | None = None,
) -> Figure:
    """One panel with everything: the data, the line of each expert, the model's boundary.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        plane: the mixture on a grid.
        title: above the panel.
        truth: the curve that separates the labels, shape [M, 2], where it is known.

    Returns:
        A figure.

    Example:
        >>> x, y, _ = grid(np.zeros((1, 2)), size=4)
        >>> slope = np.add.outer(y, x)
        >>> plane = Plane(x, y, slope[None], np.ones((1, 4, 4)), 0.5 + slope)
        >>> len(boundary_frame(np.zeros((2, 2)), np.array([0, 1]), plane, title="step 0").axes)
        1
    """
    return next(boundary_frames(points, labels, [(plane, title)], truth=truth))


def boundary_frames(
    points: np.ndarray,
    labels: np.ndarray,
    planes: Iterable[tuple[Plane, str]],
    *,
    truth: np.ndarray | None = None,
) -> Iterator[Figure]:
    """The panel of `boundary_frame` for one mixture after another, for `save_animation`.

    Args:
        points: shape [N, 2].
        labels: 0 or 1, shape [N].
        planes: mixtures on one grid, each with the title of its frame.
        truth: the curve that separates the labels, shape [M, 2], where it is known.

    Returns:
        The same figure each time, with only what moves drawn anew, so use it before the next one.

    Example:
        >>> x, y, _ = grid(np.zeros((1, 2)), size=4)
        >>> slope = np.add.outer(y, x)
        >>> plane = Plane(x, y, slope[None], np.ones((1, 4, 4)), 0.5 + slope)
        >>> planes = [(plane, "0"), (plane, "1")]
        >>> frames = boundary_frames(np.zeros((2, 2)), np.array([0, 1]), planes)
        >>> [figure.axes[0].get_title() for figure in frames]
        ['0', '1']
    """
    figure, axes = new_figure(width=5.4, height=3.8)
    ax, shades = axes[0, 0], None
    moving: list[Line2D] = []
    for number, (plane, title) in enumerate(planes):
        ax.set_title(title, y=1)  # where matplotlib would put it after a search
        if shades is None:
            shades = draw_probability(ax, plane)
            draw_points(ax, points, labels)
            draw_truth(ax, truth)
            ax.set(xlim=plane.x[[0, -1]], ylim=plane.y[[0, -1]])
            add_key(figure, len(plane.experts), truth, model=True)
            _keep_places(figure)
        for line in moving:
            line.remove()
        if number == 1:
            _freeze(figure)
        shades.set_data(plane.probability)
        moving = [*draw_experts(ax, plane), draw_boundary(ax, plane)]
        yield figure


def _keep_places(figure: Figure) -> None:
    """Lays a figure out for good: what is drawn in it later leaves its axes where they are."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")


def _freeze(figure: Figure) -> None:
    # Ticks, labels and the key take most of a frame's time and never change, so a picture of them
    # takes their place.
    [ax] = figure.axes
    inside = [*ax.images, *ax.lines, *ax.collections, *ax.spines.values(), ax.title]
    for artist in inside:
        artist.set_visible(False)
    still = pixels(figure)
    for artist in inside:
        artist.set_visible(True)
    for legend in list(figure.legends):
        legend.remove()
    ax.xaxis.set_visible(False)
    ax.yaxis.set_visible(False)
    ax.patch.set_visible(False)
    figure.add_artist(_Pixels(still))


class _Pixels(Artist):
    """A picture of the whole figure, below all else. `Figure.figimage` would resample it."""

    zorder = -1

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        self.pixels = pixels[::-1]

    def draw(self, renderer: RendererBase) -> None:
        """Copies the pixels."""
        renderer.draw_image(renderer.new_gc(), 0, 0, self.pixels)
