"""Pictures of the runs: losses, the kinds of characters that experts take, a text by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data.kinds import KINDS
from data.text import decode
from language.report import Runs, losses, seconds, steps
from moejax.plot import color
from studies.curves import mean_and_range


def curves(runs: Runs) -> Figure:
    """Validation loss against steps and against seconds; the band is the range over seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2, sharey=True)
    for index, (name, each) in enumerate(runs.items()):
        every, clock = losses(each), seconds(each).mean(axis=0)
        for ax, where in zip(axes, (steps(each), clock), strict=True):
            mean_and_range(ax, where, every, color=color(index), label=name)
    for ax, label in zip(axes, ("steps", "seconds of training"), strict=True):
        ax.set(xlabel=label)
        ax.grid(alpha=0.3)
    # The first of many are steep and much the same for all; without them the rest is told apart.
    early = min(len(steps(each)) for each in runs.values()) // 8
    if early:
        axes[0].set_ylim(None, max(losses(each).max(axis=0)[early] for each in runs.values()))
    axes[0].set_ylabel("validation loss, nats per character")
    axes[0].legend(frameon=False)
    return figure


def specialisation(by_kind: np.ndarray) -> Figure:
    """Which expert takes which kind of character, [L, E, kinds]: shares of every kind."""
    num_layers, num_experts, _ = by_kind.shape
    figure = Figure(figsize=(1 + 4.4 * num_layers, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, num_layers, squeeze=False)[0]
    for number, (ax, counts) in enumerate(zip(axes, by_kind, strict=True)):
        share = counts / np.maximum(counts.sum(axis=0), 1e-9)  # [E, kinds]
        ax.imshow(share.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (expert, kind), value in np.ndenumerate(share):
            ink = "white" if value > 0.5 else "#222222"
            ax.text(expert, kind, f"{value:.0%}", ha="center", va="center", color=ink, fontsize=7)
        ax.set(title=f"layer {number + 1}", xlabel="expert")
        ax.set_xticks(range(num_experts))
        ax.set_yticks(range(len(KINDS)), KINDS if number == 0 else [""] * len(KINDS))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure


def balance(load: np.ndarray) -> Figure:
    """The share of the choices that each expert gets, [L, E]; the line is perfect balance."""
    num_layers, num_experts = load.shape
    figure = Figure(figsize=(1 + 3 * num_layers, 2.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, num_layers, squeeze=False, sharey=True)[0]
    for number, (ax, shares) in enumerate(zip(axes, load, strict=True)):
        ax.bar(range(num_experts), shares, color=[color(e) for e in range(num_experts)])
        ax.axhline(1 / num_experts, color="#222222", linewidth=1, linestyle=":")
        ax.set(title=f"layer {number + 1}", xlabel="expert")
        ax.set_xticks(range(num_experts))
    axes[0].set_ylabel("share of the choices")
    return figure


def coloured_text(characters: np.ndarray, experts: np.ndarray, *, columns: int = 88) -> Figure:
    """A text, every character in the colour of its expert, once per layer: experts [L, S]."""
    rows = wrapped(decode(characters), columns)
    height = 0.165 * len(rows) + 0.3
    figure = Figure(figsize=(0.092 * columns, height * len(experts)), layout="constrained", dpi=120)
    axes = figure.subplots(len(experts), 1, squeeze=False)[:, 0]
    for number, (ax, chosen) in enumerate(zip(axes, experts, strict=True)):
        ax.set(xlim=(0, columns), ylim=(len(rows), 0))
        ax.set_title(f"layer {number + 1}", fontsize=8, loc="left")
        ax.axis("off")
        for row, line in enumerate(rows):
            for column, (place, character) in enumerate(line):
                _letter(ax, column, row, character, color(int(chosen[place])))
    return figure


def wrapped(text: str, columns: int) -> list[list[tuple[int, str]]]:
    """Lines of (place in the text, character), broken at newlines and at a width."""
    rows: list[list[tuple[int, str]]] = [[]]
    for place, character in enumerate(text):
        if character == "\n" or len(rows[-1]) == columns:
            rows.append([])
        if character != "\n":
            rows[-1].append((place, character))
    return rows


def _letter(ax: Any, column: int, row: int, character: str, shade: str) -> None:
    # Not parsed as mathematics, which a dollar sign would start.
    ax.text(
        column,
        row + 0.8,
        character,
        color=shade,
        family="monospace",
        fontsize=8,
        parse_math=False,
        weight="bold",
    )
