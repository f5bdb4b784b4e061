"""How training went, and where the model errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moejax.plot.diagnostics import epoch_axis
from moejax.plot.style import WHOLE_MODEL, color, new_figure

STYLES = ("-", ":", "-.", "--")  # of runs: no hues, which are for experts


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and accuracy per epoch: training dotted and hollow, test solid, one colour per model.

    Args:
        histories: for each model one record per epoch, with ``epoch``, ``train_loss``,
            ``test_loss``, ``train_accuracy`` and ``test_accuracy``.

    Returns:
        A figure with two panels.

    Raises:
        ValueError: if there is no record to draw.

    Example:
        >>> record = dict(epoch=1, train_loss=1, test_loss=1, train_accuracy=0.5, test_accuracy=0.5)
        >>> figure = curves({"soft": [record]})
        >>> len(figure.axes), [text.get_text() for text in figure.legends[0].texts]
        (2, ['soft, train', 'soft, test'])
    """
    every = [int(record["epoch"]) for history in histories.values() for record in history]
    if not every:
        raise ValueError("There is nothing to draw: give at least one model with one record.")
    figure, axes = new_figure(1, 2, width=9, height=3.6)
    for ax, name in zip(axes[0], ("loss", "accuracy"), strict=True):
        for index, (model, history) in enumerate(histories.items()):
            epochs = [record["epoch"] for record in history]
            for split, style, fill in (("train", ":", "white"), ("test", "-", color(index))):
                values = [record[f"{split}_{name}"] for record in history]
                ax.plot(
                    epochs,
                    values,
                    style,
                    color=color(index),
                    marker="o",
                    markersize=5,
                    markerfacecolor=fill,
                    label=f"{model}, {split}",
                )
        epoch_axis(ax, every)
        ax.set_ylabel("cross-entropy, nats" if name == "loss" else name)
        ax.margins(y=0.15)
    axes[0, 1].yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def loss(
    runs: Mapping[str, np.ndarray], seeds: np.ndarray, *, ylabel: str = "mean squared error"
) -> Figure:
    """Loss per step: named runs as lines, many seeds as a band.

    Args:
        runs: for each run its losses, shape [steps].
        seeds: losses of one run per seed, shape [seeds, steps].
        ylabel: what the loss is.

    Returns:
        A figure; the band holds the middle 90% of the seeds whose loss is a number at that step.

    Example:
        >>> len(loss({"this run": np.ones(3)}, np.ones((2, 3))).axes)
        1
    """
    figure, axes = new_figure(width=5.4, height=3.8)
    ax = axes[0, 0]
    low, middle, high = np.nanquantile(seeds, [0.05, 0.5, 0.95], axis=0)
    ax.fill_between(
        range(len(low)),
        low,
        high,
        color="#bbbbbb",
        alpha=0.6,
        linewidth=0,
        label=f"middle 90% of {len(seeds)} seeds",
    )
    ax.plot(middle, "--", color="#666666", linewidth=1.2, label="median seed")
    for style, (name, losses) in zip(cycle(STYLES), runs.items(), strict=False):
        ax.plot(losses, style, color=WHOLE_MODEL, linewidth=1.6, label=name)
    longest = max(len(losses) for losses in (low, *runs.values()))
    ax.set(xlabel="steps taken", ylabel=ylabel, xlim=(0, max(longest - 1, 1)))
    if ax.dataLim.ymin >= 0:  # minus a log-likelihood may be negative
        ax.set_ylim(0, None)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def confusion(counts: np.ndarray, *, classes: str = "class") -> Figure:
    """The confusion matrix: which class is taken for which.

    Args:
        counts: examples by true class and predicted class, shape [classes, classes].
        classes: what a class is, such as ``"digit"``.

    Returns:
        A figure; shades are shares of the row, numbers are counts.

    Example:
        >>> len(confusion(np.eye(3, dtype=int)).axes)
        1
    """
    figure, axes = new_figure(width=6, height=5.4)
    ax = axes[0, 0]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root brings out the few mistakes beside the many right answers.
    ax.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[true, predicted] > 0.3 else "#222222"
            ax.text(predicted, true, str(count), ha="center", va="center", color=color, fontsize=8)
    title = f"Examples by true and predicted {classes}"
    ax.set(xlabel=f"predicted {classes}", ylabel=f"true {classes}", title=title)
    ax.set_xticks(range(len(counts)))
    ax.set_yticks(range(len(counts)))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure
