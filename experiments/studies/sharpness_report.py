"""Rokah et al.'s curvatures beside ours: the summary and the tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from studies.blocks import Measured
from studies.intervals import interval, intervals_of, shown
from studies.page import Summary, duration, table

# The outputs stored in the authors' notebook cifar10_hessian_plots: one run of each head on
# CIFAR-10, at 1,000 images of either kind.
PUBLISHED = {
    "dense": {
        "train_largest": 2.3769,
        "train_trace": 22.7491,
        "test_largest": 63.8738,
        "test_trace": 1180.4783,
    },
    "soft": {
        "train_largest": 1.0994,
        "train_trace": 19.8563,
        "test_largest": 92.2243,
        "test_trace": 1455.3439,
    },
    "top-2": {
        "train_largest": 0.7219,
        "train_trace": 15.2338,
        "test_largest": 68.7120,
        "test_trace": 1148.1774,
    },
}
BASE = "dense"
SPLITS = ("train", "test")
TITLES = {"largest": "largest eigenvalue", "trace": "trace"}
MEASURES = [f"{split}_{measure}" for measure in TITLES for split in SPLITS]


def summarize(measured: dict[str, Measured]) -> Summary:
    """Every number with its interval, beside the published, and ratios to the dense head's."""
    others = [name for name in measured if name != BASE and BASE in measured]
    return {
        "cells": intervals_of(measured),
        "published": {name: PUBLISHED.get(name, {}) for name in measured},
        "ratios": {
            name: {
                measure: ratio(measured[name][measure], measured[BASE][measure])
                for measure in MEASURES
            }
            for name in others
        },
    }


def ratio(values: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Ratios by seed; their geometric mean, deviation and interval, through logarithms."""
    known = (values > 0) & (base > 0)  # a trace whose estimate is negative has no logarithm
    if not known.any():
        return {"values": [], **dict.fromkeys(("mean", "sd", "low", "high"))}
    found = interval(np.log(values[known] / base[known]))
    through = {name: value if value is None else math.exp(value) for name, value in found.items()}
    return {"values": values[known] / base[known], **through}


def render(summary: Summary) -> str:
    """The tables, and what they say of the paper's claim."""
    eigenvalues = beside_published(summary, "largest", {"ours": ("largest", 2)})
    trace = {"ours": ("trace", 1), "standard error": ("error", 1)}
    traces = beside_published(summary, "trace", trace)
    return (
        f"Accuracy in percent, and cross-entropy at the images of the Hessian:\n\n{fits(summary)}\n"
        f"Largest eigenvalue of the Hessian:\n\n{eigenvalues}\n"
        f"Trace of the Hessian, and the standard error of one seed's:\n\n{traces}\n"
        f"{ratios(summary)}{precision(summary)}\n\n{duration(summary)}"
    )


def fits(summary: Summary) -> str:
    """How well the heads learn."""
    return table(
        ["head", "seeds", "train accuracy", "test accuracy", "train loss", "test loss"],
        [
            [
                name,
                str(len(one["accuracy"]["values"])),
                *(shown(one[measure], 2) for measure in ("train_accuracy", "accuracy")),
                *(shown(one[measure], 4) for measure in ("train_loss", "test_loss")),
            ]
            for name, one in summary["cells"].items()
        ],
    )


def beside_published(summary: Summary, measure: str, ours: dict[str, tuple[str, int]]) -> str:
    """The table of a measure on both kinds of images.

    Args:
        summary: of the study.
        measure: whose published number comes first.
        ours: by heading, which measure to show and with how many digits.
    """
    return table(
        ["head", *(f"{split}, {heading}" for split in SPLITS for heading in ("published", *ours))],
        [
            [
                name,
                *(
                    text
                    for split in SPLITS
                    for text in (
                        published(summary, name, f"{split}_{measure}"),
                        *(shown(one[f"{split}_{each}"], digits) for each, digits in ours.values()),
                    )
                ),
            ]
            for name, one in summary["cells"].items()
        ],
    )


def published(summary: Summary, name: str, measure: str) -> str:
    """A published number, if there is one."""
    value = summary["published"][name].get(measure)
    return "" if value is None else f"{value:.4g}"


def ratios(summary: Summary) -> str:
    """How much sharper than the dense head, seed by seed, and what that says of the claim."""
    if not summary["ratios"]:
        return ""
    rows = table(
        ["head", "measure", "images", "published", "ours"],
        [
            [
                name,
                TITLES[measure],
                split,
                ratio_published(summary, name, place),
                "" if found["mean"] is None else shown(found, 2),
            ]
            for name, each in summary["ratios"].items()
            for place, found in each.items()
            for split, _, measure in [place.partition("_")]
        ],
    )
    sentences = " ".join(sentence(name, each) for name, each in summary["ratios"].items())
    return (
        f"Ratios to the dense head, seed by seed, and their geometric mean:\n\n{rows}\n"
        f"{sentences} {sharpest(summary)}\n\n"
    )


def ratio_published(summary: Summary, name: str, measure: str) -> str:
    """The ratio of the paper's one run of a head to its one run of the dense head."""
    theirs, base = (summary["published"][each].get(measure) for each in (name, BASE))
    return "" if theirs is None else f"{theirs / base:.2f}"


def sentence(name: str, each: dict[str, Any]) -> str:
    """Where the interval of a head's ratios leaves one out."""
    known = {place: one for place, one in each.items() if one["low"] is not None}
    if not known:
        return f"One seed shows no difference between {name} and dense."
    above = [place for place, one in known.items() if one["low"] > 1]
    below = [place for place, one in known.items() if one["high"] < 1]
    than = f"sharper than dense by {listed(above)} and flatter by {listed(below)}"
    return f"{name.capitalize()} is shown to be {than}."


def sharpest(summary: Summary) -> str:
    """Whether the sharpest of the published heads is the sharpest of ours."""
    heads = [name for name, theirs in summary["published"].items() if theirs]
    orders = [
        f"{listed([place])}: {max(heads, key=lambda name: summary['published'][name][place])} and "
        f"{max(heads, key=lambda name: summary['cells'][name][place]['mean'])}"
        for place in MEASURES
    ]
    return f"Sharpest of {', '.join(heads)}, published and ours: {'; '.join(orders)}."


def listed(places: list[str]) -> str:
    """Measures in words."""
    parts = [place.partition("_") for place in places]
    return ", ".join(f"{TITLES[measure]} ({split})" for split, _, measure in parts) or "no measure"


def precision(summary: Summary) -> str:
    """How far the estimates can be off."""
    worst = {
        measure: max(
            max(abs(np.divide(one[f"{split}_{measure}"]["values"], one[f"{split}_{of}"]["values"])))
            for one in summary["cells"].values()
            for split in SPLITS
        )
        for measure, of in (("residual", "largest"), ("error", "trace"))
    }
    return (
        "By the residual of Lanczos, each largest eigenvalue is within "
        f"{percent(worst['residual'])} of a true one, over all heads and seeds; no standard error "
        f"of a trace is more than {percent(worst['error'])} of it."
    )


def percent(share: float) -> str:
    """A share in percent, with two digits and without an exponent."""
    digits = np.format_float_positional(100 * share, precision=2, fractional=False, trim="-")
    return f"{digits}%"
