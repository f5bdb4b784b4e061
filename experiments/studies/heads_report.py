"""Rokah et al.'s accuracies beside ours: the summary and the tables."""

from __future__ import annotations

from typing import Any

from studies.blocks import Measured
from studies.heads import EXPERTS
from studies.intervals import ONE_SEED, shown, shown_with_deviation, with_interval
from studies.page import Summary, duration, table

# One run of each head on a ResNet-18, in percent of the validation images at the best epoch; and
# the loads that the paper gives of a sparse head.
PUBLISHED = {"dense": 99.65, "soft": 99.67, "top-2": 99.58, "top-1": 99.62}
PUBLISHED_LOADS = {"top-1": (0.044, 0.286)}
BASE = "dense"


def summarize(measured: dict[str, Measured]) -> Summary:
    """Accuracies and loads of every head, with intervals, and how far heads are from dense."""
    accuracies = {name: one["accuracy"][:, -1] for name, one in measured.items()}
    return {
        "cells": {name: of_head(one) for name, one in measured.items()},
        "published": {name: PUBLISHED[name] for name in measured},
        "differences": {
            name: with_interval(values - accuracies[BASE])
            for name, values in accuracies.items()
            if name != BASE and BASE in accuracies
        },
    }


def of_head(one: Measured) -> dict[str, Any]:
    """One head, over seeds.

    Returns:
        ``accuracy`` after the last epoch; ``blended``, that over nine shifts of every image;
        ``best``, that of the best epoch; ``loss``, the mean cross-entropy of the last epoch's
        steps, on the images of training; and of a sparse head
        ``smallest`` and ``largest``, the loads of the experts that serve the fewest and the most
        images, 1 being an even share.
    """
    found = {
        "accuracy": one["accuracy"][:, -1],
        "blended": one["blended"],
        "best": one["accuracy"].max(axis=1),
        "loss": one["loss"][:, -1],
    }
    if "load" in one:
        even = EXPERTS * one["load"][:, -1]
        found |= {"smallest": even.min(axis=1), "largest": even.max(axis=1)}
    return {name: with_interval(values) for name, values in found.items()}


def render(summary: Summary) -> str:
    """Accuracies, and loads where heads have some."""
    parts = [accuracies(summary), verdict(summary), loads(summary), duration(summary)]
    return "\n".join(filter(None, parts))


def accuracies(summary: Summary) -> str:
    """Of every head, beside the published."""
    rows = table(
        [
            "head",
            "seeds",
            "published",
            "ours, best epoch",
            "ours, last epoch",
            "minus dense",
            "last epoch, nine shifts",
        ],
        [
            [
                name,
                str(len(one["accuracy"]["values"])),
                f"{summary['published'][name]:.2f}",
                shown(one["best"], 2),
                shown_with_deviation(one["accuracy"], 2),
                shown(summary["differences"][name], 3) if name in summary["differences"] else "",
                shown_with_deviation(one["blended"], 2),
            ]
            for name, one in summary["cells"].items()
        ],
    )
    return (
        "Accuracy in percent, the published on validation images and ours on all test images; and "
        f"the difference to the dense head, seed by seed:\n\n{rows}"
    )


def verdict(summary: Summary) -> str:
    """Which heads are better or worse than dense, as far as the intervals tell."""
    if not summary["differences"]:
        return ""
    known = {name: one for name, one in summary["differences"].items() if one["low"] is not None}
    if not known:
        return f"{ONE_SEED}\n"
    better = [name for name, one in known.items() if one["low"] > 0]
    worse = [name for name, one in known.items() if one["high"] < 0]
    return (
        f"Better than dense, by an interval that leaves out zero: {listed(better)}; worse: "
        f"{listed(worse)}.\n"
    )


def listed(names: list[str]) -> str:
    """Heads in words."""
    return ", ".join(names) or "no head"


def loads(summary: Summary) -> str:
    """How evenly the experts of sparse heads are used."""
    sparse = {name: one for name, one in summary["cells"].items() if "smallest" in one}
    if not sparse:
        return ""
    rows = table(
        ["head", "published", "ours, least used expert", "ours, most used expert"],
        [
            [name, published_loads(name), shown(one["smallest"], 2), shown(one["largest"], 2)]
            for name, one in sparse.items()
        ],
    )
    farthest = max(
        abs(load - 1)
        for one in sparse.values()
        for part in ("smallest", "largest")
        for load in one[part]["values"]
    )
    return (
        f"Loads on test images, as multiples of an even share:\n\n{rows}\n"
        f"The load farthest from even, of any head and seed, is {100 * farthest:.1f}% off.\n"
    )


def published_loads(name: str) -> str:
    """The paper's, as multiples of an even share."""
    return " to ".join(f"{EXPERTS * load:.2f}" for load in PUBLISHED_LOADS.get(name, ()))
