"""The picture of the study of sharpness: spectra, numbers and lines of all heads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from studies.blocks import Measured
from studies.curves import mean_and_range
from studies.heads import shade
from studies.hessian import density
from studies.intervals import half_width
from studies.page import Summary
from studies.sharpness_models import MODELS
from studies.sharpness_report import SPLITS, TITLES
from studies.sharpness_training import DISTANCES

FADED, MARKERS = {"train": 1.0, "test": 0.45}, {"train": "o", "test": "s"}
OFFSETS = {"train": -0.15, "test": 0.15}


def draw(summary: Summary, measured: dict[str, Measured]) -> Any:
    """The spectrum of every head; its largest eigenvalue, trace and line beside the others'."""
    from moejax.plot import new_figure

    figure, axes = new_figure(2, len(MODELS), width=12, height=6)
    edges = [one[f"{split}_values"] for one in measured.values() for split in SPLITS]
    places = np.linspace(min(map(np.min, edges)), max(map(np.max, edges)), 800)
    for ax, (name, one) in zip(axes[0], measured.items(), strict=False):
        draw_density(ax, one, places, name)
    for ax in axes[0, len(measured) :]:
        ax.set_axis_off()
    for ax, measure in zip(axes[1], TITLES, strict=False):
        draw_numbers(ax, summary, measure)
    axes[1, 3].sharey(axes[1, 2])
    for ax, split in zip(axes[1, 2:], SPLITS, strict=True):
        draw_lines(ax, measured, split)
    axes[0, 0].set_ylabel("density of eigenvalues")
    axes[1, 2].set_ylabel("cross-entropy")
    axes[0, 0].legend(fontsize=8)
    axes[1, 1].legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.68))
    axes[1, 2].legend(fontsize=8, loc="upper center")
    return figure


def draw_density(ax: Any, one: Measured, places: np.ndarray, name: str) -> None:
    """Both kinds of images, over all starts of all seeds."""
    width = (places[-1] - places[0]) / 150
    for split in SPLITS:
        values, weights = (
            jnp.asarray(one[f"{split}_{part}"].reshape(-1, one[f"{split}_{part}"].shape[-1]))
            for part in ("values", "weights")
        )
        curve = density(values, weights, jnp.asarray(places), width)
        ax.plot(places, curve, color=shade(name), alpha=FADED[split], linewidth=1.2, label=split)
    ax.set(yscale="log", ylim=(1e-7, 1e2), xlabel="eigenvalue")
    ax.set_title(name, size=10)


def draw_numbers(ax: Any, summary: Summary, measure: str) -> None:
    """Means with intervals, and in grey what was published."""
    heads = summary["cells"]
    for split in SPLITS:
        draw_means(ax, heads, split, f"{split}_{measure}")
        published = [summary["published"][name].get(f"{split}_{measure}", np.nan) for name in heads]
        places = np.arange(len(heads)) + OFFSETS[split]
        style = {"ls": "", "marker": MARKERS[split], "ms": 5, "fillstyle": "none"}
        ax.plot(places, published, color="0.5", label=f"{split}, published", **style)
    ax.set(yscale="log", xlim=(-0.5, len(heads) - 0.5))
    ax.set_xticks(range(len(heads)), list(heads))
    ax.set_title(TITLES[measure], size=10)


def draw_means(ax: Any, heads: dict[str, Any], split: str, measure: str) -> None:
    """Ours, each head in its colour."""
    style = {"fmt": MARKERS[split], "ms": 5, "capsize": 3, "alpha": FADED[split]}
    for place, (name, one) in enumerate(heads.items()):
        found = one[measure]
        label = None if place else f"{split}, mean and 95%"
        place_of = place + OFFSETS[split]
        ax.errorbar(
            place_of, found["mean"], half_width(found), color=shade(name), label=label, **style
        )


def draw_lines(ax: Any, measured: dict[str, Measured], split: str) -> None:
    """The loss along the top eigenvector: the mean over seeds, and their range."""
    for name, one in measured.items():
        lines = one[f"{split}_line"]
        mean_and_range(ax, DISTANCES, lines, color=shade(name), label=name)
    ax.set(xlabel="distance along the top eigenvector")
    ax.set_title(f"{split} images, mean and range", size=10)
