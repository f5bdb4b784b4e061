"""A number over seeds: its mean, its standard deviation, and an interval for the mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
ONE_SEED = "One seed shows no difference."


def interval(values: np.ndarray) -> dict[str, float | None]:
    """Mean, standard deviation and Student's interval, ``mean +- t sd / sqrt(n)``, at 95%.

    Args:
        values: one per seed, shape [n].

    Returns:
        ``mean``, ``sd``, ``low`` and ``high``; with one seed the mean alone, the rest None.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def with_interval(values: np.ndarray) -> dict[str, Any]:
    """The values themselves beside their `interval`."""
    return {"values": values, **interval(values)}


def intervals_of(measured: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Every measure that is one number per seed `with_interval`, by cell; curves are left out."""
    return {
        cell: {name: with_interval(values) for name, values in one.items() if values.ndim == 1}
        for cell, one in measured.items()
    }


def half_width(one: dict[str, Any]) -> float:
    """Half the width of an interval, as an error bar shows it; one seed has none."""
    return 0.0 if one["low"] is None else one["high"] - one["mean"]


def shown(one: dict[str, Any], digits: int) -> str:
    """A mean and its interval as a table shows them, such as ``99.46 [99.07, 99.85]``."""
    if one["low"] is None:
        return f"{one['mean']:.{digits}f}"
    return f"{one['mean']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"


def shown_with_deviation(one: dict[str, Any], digits: int) -> str:
    """A mean with its deviation and interval, such as ``99.46 ± 0.02 [99.07, 99.85]``."""
    mean, *limits = shown(one, digits).split(" ", 1)
    deviation = [] if one["sd"] is None else [f"± {one['sd']:.{digits}f}"]
    return " ".join([mean, *deviation, *limits])
