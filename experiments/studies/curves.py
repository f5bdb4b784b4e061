"""Curves over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np


def mean_and_range(ax: Any, x: np.ndarray, curves: np.ndarray, *, color: str, label: str) -> None:
    """Draws the mean of the curves, [seeds, points], and the range that they lie in."""
    ax.plot(x, curves.mean(axis=0), ".-", ms=4, color=color, label=label)
    low, high = curves.min(axis=0), curves.max(axis=0)
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
