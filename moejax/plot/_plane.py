"""What pictures of a plane are made of: points, lines of experts, regions, shades, and a key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from contourpy import LineType, contour_generator
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from moejax.plot.style import WHOLE_MODEL, color

CLASS_MARKS = (("#8f8f8f", "x"), ("#111111", "."))  # label 0, label 1
SHADES = LinearSegmentedColormap.from_list("label 1", ["#ffffff", "#7d7d7d"])
MOST_IN_KEY = 12  # experts


class Plane(NamedTuple):
    """A mixture evaluated on a grid of points.

    Attributes:
        x: first coordinates, shape [W].
        y: second coordinates, shape [H].
        experts: the output of each expert, shape [E, H, W]; its boundary is at zero.
        gates: the gate of each expert, shape [E, H, W].
        probability: of label 1 by the whole model, shape [H, W].

    Example:
        >>> x, y, points = moejax.plot.grid(np.zeros((1, 2)), size=4)
        >>> model = moejax.moe(moejax.linear(2, 1), moejax.linear(2, 3), num_experts=3)
        >>> output, routing = model.apply(model.init(jax.random.key(0)), points)
        >>> gates = routing.gates.T.reshape(3, 4, 4)
        >>> plane = Plane(x, y, gates, gates, jax.nn.sigmoid(output).reshape(4, 4))
        >>> plane.gates.shape
        (3, 4, 4)
    """

    x: np.ndarray
    y: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    probability: np.ndarray

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top, as matplotlib wants them."""
        return self.x[0], self.x[-1], self.y[0], self.y[-1]


def draw_points(ax: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    """Draws points, marked by label."""
    for label, (shade, marker) in enumerate(CLASS_MARKS):
        own = points[labels == label]
        ax.scatter(own[:, 0], own[:, 1], s=10, c=shade, marker=marker, linewidths=0.7, alpha=0.8)
    ax.set(xlabel="x₁", ylabel="x₂", aspect="equal")


def draw_truth(ax: Axes, truth: np.ndarray | None) -> None:
    """Draws the curve that separates the labels, if it is known."""
    if truth is not None:
        ax.plot(truth[:, 0], truth[:, 1], ":", color=WHOLE_MODEL, linewidth=1.4)


def draw_experts(ax: Axes, plane: Plane) -> list[Line2D]:
    """Draws the line where each expert's output is zero."""
    return [
        _contour(ax, plane, outputs, 0.0, color(expert))
        for expert, outputs in enumerate(plane.experts)
    ]


def draw_gate(ax: Axes, plane: Plane) -> None:
    """Shades each point by the expert with the largest gate, paler where the gate is undecided."""
    best = plane.gates.argmax(axis=0)  # [H, W]
    uniform = 1 / len(plane.gates)
    certainty = (plane.gates.max(axis=0) - uniform) / max(1 - uniform, 1e-9)
    ax.imshow(
        best,
        cmap=ListedColormap([color(e) for e in range(len(plane.gates))]),
        vmin=-0.5,
        vmax=len(plane.gates) - 0.5,
        origin="lower",
        extent=plane.extent,
        alpha=0.12 + 0.43 * np.clip(certainty, 0, 1),
        interpolation="nearest",
    )


def draw_probability(ax: Axes, plane: Plane) -> AxesImage:
    """Shades the probability of label 1."""
    return ax.imshow(
        plane.probability,
        cmap=SHADES,
        vmin=0,
        vmax=1,
        origin="lower",
        extent=plane.extent,
        interpolation="bilinear",
    )


def draw_boundary(ax: Axes, plane: Plane) -> Line2D:
    """Draws where the probability of label 1 is one half."""
    return _contour(ax, plane, plane.probability, 0.5, WHOLE_MODEL)


def _contour(ax: Axes, plane: Plane, values: np.ndarray, level: float, shade: str) -> Line2D:
    # `Axes.contour` takes far longer to make its artists than to find this line. The pieces
    # of the line are separated by NaN; a line that misses the plane has none.
    lines = contour_generator(plane.x, plane.y, values, line_type=LineType.ChunkCombinedNan)
    [points] = lines.lines(level)[0]
    x, y = ([], []) if points is None else points.T
    return ax.plot(x, y, color=shade, linewidth=2)[0]


def add_key(figure: Figure, num_experts: int, truth: np.ndarray | None, model: bool) -> None:
    """Explains each mark and line below the panels, where the key covers no point."""
    handles = [
        Line2D([], [], color=shade, marker=marker, linestyle="", label=f"label {label}")
        for label, (shade, marker) in enumerate(CLASS_MARKS)
    ]
    if truth is not None:
        handles.append(
            Line2D([], [], color=WHOLE_MODEL, linestyle=":", label="true boundary of the labels")
        )
    if model:
        handles.append(
            Line2D([], [], color=WHOLE_MODEL, linewidth=2, label="boundary of the mixture")
        )
    handles += [
        Line2D([], [], color=color(e), linewidth=2, label=f"expert {e}")
        for e in range(min(num_experts, MOST_IN_KEY))
    ]
    columns = min(len(handles), int(figure.get_figwidth() * 0.75))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
