"""Rokah et al.'s accuracies beside ours: the summary and the tables."""

from __future__ import annotations

from typing import Any

from studies.blocks import Measured
from studies.heads import EXPERTS
from studies.intervals import shown, with_interval
from studies.page import Summary, duration, table

# One run of each head on a ResNet-18, in percent of the validation images at the best epoch; and
# the loads that the paper gives of a sparse head.
PUBLISHED = {"dense": 99.65, "soft": 99.67, "top-2": 99.58, "top-1": 99.62}
PUBLISHED_LOADS = {"top-1": (0.044, 0.286)}


def summarize(measured: dict[str, Measured]) -> Summary:
    """Accuracies and loads of every head, with intervals."""
    return {
        "cells": {name: of_head(one) for name, one in measured.items()},
        "published": {name: PUBLISHED[name] for name in measured},
    }


def of_head(one: Measured) -> dict[str, Any]:
    """One head, over seeds.

    Returns:
        ``accuracy`` and ``cross_entropy`` after the last epoch, and ``best``, the accuracy of the
        best epoch; of a sparse head ``smallest`` and ``largest``, the loads of the experts that
        serve the fewest and the most images, 1 being an even share.
    """
    found = {
        "accuracy": one["accuracy"][:, -1],
        "best": one["accuracy"].max(axis=1),
        "loss": one["loss"][:, -1],
    }
    if "load" in one:
        even = EXPERTS * one["load"][:, -1]
        found |= {"smallest": even.min(axis=1), "largest": even.max(axis=1)}
    return {name: with_interval(values) for name, values in found.items()}


def render(summary: Summary) -> str:
    """The tables, and in a sentence the best head and how even the loads are."""
    accuracies = table(
        ["head", "seeds", "published", "ours, best epoch", "ours, last epoch", "sd"],
        [
            [
                name,
                str(len(one["accuracy"]["values"])),
                f"{summary['published'][name]:.2f}",
                shown(one["best"], 2),
                shown(one["accuracy"], 2),
                deviation(one["accuracy"]),
            ]
            for name, one in summary["cells"].items()
        ],
    )
    loads = table(
        ["head", "published", "ours, least used expert", "ours, most used expert"],
        [
            [name, published_loads(name), shown(one["smallest"], 2), shown(one["largest"], 2)]
            for name, one in sparse(summary).items()
        ],
    )
    return (
        f"Accuracy in percent, published on validation images and ours on all test images:\n\n"
        f"{accuracies}\nLoads on test images, as multiples of an even share:\n\n{loads}\n"
        f"{sentence(summary)}\n\n{duration(summary)}"
    )


def deviation(one: dict[str, Any]) -> str:
    """The standard deviation over seeds, if there is one."""
    return "" if one["sd"] is None else f"{one['sd']:.3f}"


def sparse(summary: Summary) -> dict[str, dict[str, Any]]:
    """The heads that have loads."""
    return {name: one for name, one in summary["cells"].items() if "smallest" in one}


def published_loads(name: str) -> str:
    """The paper's, as multiples of an even share."""
    found = PUBLISHED_LOADS.get(name, ())
    return " to ".join(f"{EXPERTS * load:.2f}" for load in found)


def sentence(summary: Summary) -> str:
    """Best and worst head by their means, and the load farthest from even of any seed."""
    means = {name: one["accuracy"]["mean"] for name, one in summary["cells"].items()}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    text = (
        f"After the last epoch {best} is best with {means[best]:.2f}, {worst} last with "
        f"{means[worst]:.2f}."
    )
    farthest = [
        max(abs(load - 1) for part in ("smallest", "largest") for load in one[part]["values"])
        for one in sparse(summary).values()
    ]
    return text + (
        f" No load of a sparse head, in any seed, is farther than {100 * max(farthest):.0f}% from "
        "even."
        if farthest
        else ""
    )
