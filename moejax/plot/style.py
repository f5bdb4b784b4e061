"""Colours by meaning, and the grid of axes that every picture starts from.

In all pictures, a hue is an expert (or a model, where models are compared). Grey is everything
else: labels, the whole model, what many runs have in common.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito: told apart with any colour vision.
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#999933",
    "#882255",
)
WHOLE_MODEL = "#222222"


def color(index: int) -> str:
    """The colour of an expert or a model; they repeat after eight.

    Args:
        index: its number.

    Returns:
        A hexadecimal colour.

    Example:
        >>> color(0) == color(8)
        True
    """
    return _COLORS[index % len(_COLORS)]


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float, height: float
) -> tuple[Figure, Any]:
    """A figure with a grid of axes, laid out so that nothing is clipped.

    It is drawn by its own canvas, so no window system is used, whichever is set.

    Args:
        rows: of axes.
        columns: of axes.
        width: of the figure in inches.
        height: of the figure in inches.

    Returns:
        The figure, and its axes as an array [rows, columns].

    Example:
        >>> figure, axes = new_figure(1, 2, width=6, height=3)
        >>> axes.shape
        (1, 2)
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pixels(figure: Figure) -> np.ndarray:
    """Draws a figure.

    Args:
        figure: of any canvas.

    Returns:
        Red, green, blue and opacity, from 0 to 255, shape [H, W, 4].

    Example:
        >>> pixels(new_figure(width=1, height=2)[0]).shape
        (240, 120, 4)
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()
