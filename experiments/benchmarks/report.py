"""What the benchmark shows: a table per problem, and three pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.layers import DROPLESS
from benchmarks.peers import Shape
from benchmarks.timing import BACKWARD, FORWARD, Result
from moejax.plot import color, new_figure
from parts.command_line import say
from parts.output import save_figure

FLOORS = {
    "matmul_floor": ("--", "the products alone"),
    "memory_floor": (":", "reading the parameters"),
}


def print_table(result: Result) -> None:
    """Prints one row per contender; a buffer is T x K rows of the widest dimension."""
    sizes = ", ".join(f"{name}={value}" for name, value in result.sizes.items())
    say(f"{result.suite}: {sizes}")
    buffer = buffer_bytes(result.sizes)
    say(
        f"{'':42s}{'ms':>10s}{'share':>7s}{'peak MB':>9s}{'buffers':>9s}{'faults':>9s}"
        f"{'compile s':>11s}"
    )
    for record in result.records:
        say(row(record, buffer))
    if busy := result.records[0].get("busy_elsewhere"):
        say(f"other processes took {busy:.0%} of the machine meanwhile")
    for name, reason in result.skipped.items():
        say(f"{name} left out: {reason}")
    say()


def print_traffic(result: Result) -> None:
    """Prints one row per mesh."""
    sizes = ", ".join(f"{name}={value}" for name, value in result.sizes.items())
    say(f"{result.suite}: MB sent by every device in one step (least possible), {sizes} per device")
    say("data x expert        exchange          gradients       total   XLA alone")
    for record in result.records:
        exchange, gradients, total, alone, *least = (
            record[name] / 1e6
            for name in (
                "exchange",
                "gradients",
                "total",
                "partitioner_alone",
                "least_exchange",
                "least_gradients",
            )
        )
        say(
            f"{record['data']:4d} x {record['expert']:<6d} {exchange:8.2f} ({least[0]:6.2f}) "
            f"{gradients:8.2f} ({least[1]:6.2f}) {total:11.2f} {alone:11.2f}"
        )
    say()


def row(record: dict[str, Any], buffer: int | None) -> str:
    """One line of the table; a dash stands for what is not known or makes no sense."""
    name = ", ".join(filter(None, (record["contender"], record["mode"])))
    own, peak = record.get("temporary_bytes"), record.get("peak_bytes")
    buffers = own / buffer if record["mode"] and own is not None and buffer else None
    cells = [
        shown(record.get("share") or None, 7, ".0%"),
        shown(None if peak is None else peak / 1e6, 9, ".0f"),
        shown(buffers, 9, ".1f"),
        shown(record.get("page_faults"), 9, ".0f"),
        shown(record.get("compile_seconds"), 11, ".1f"),
    ]
    return f"{name:42s}{1e3 * record['seconds']:10.2f}" + "".join(cells)


def shown(value: float | None, width: int, form: str) -> str:
    """A number, right-aligned, or a dash."""
    return f"{'-' if value is None else format(value, form):>{width}s}"


def buffer_bytes(sizes: dict[str, Any]) -> int | None:
    """Size of T x K rows of the widest dimension in float32, where there are tokens."""
    return 4 * sizes["T"] * sizes["K"] * max(sizes["D"], sizes["F"]) if "T" in sizes else None


def draw(results: list[Result], folder: Path) -> list[str]:
    """Writes the pictures for which there are results, and names them."""
    scaling = [result for result in results if result.suite == "scaling"]
    layers = [result for result in results if result.suite == "layer"]
    pictures = {}
    for axis, other in (("E", "T"), ("T", "E")):
        series = longest(scaling, axis, other)
        if len(series) > 1:
            pictures[f"time_by_{axis}.png"] = times(series, axis)
    if layers:
        pictures["share.png"] = shares(layers)
    for name, figure in pictures.items():
        save_figure(figure, folder / name)
    return list(pictures)


def longest(results: list[Result], axis: str, other: str) -> list[Result]:
    """The largest group of results that differ in one size only, sorted by it."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(result.sizes[other], []).append(result)
    most = max([[], *groups.values()], key=lambda group: len(group))
    return sorted(most, key=lambda result: result.sizes[axis])


def times(series: list[Result], axis: str) -> Figure:
    """Time of every contender against a size, beside what the machine alone would take."""
    figure, axes = new_figure(1, 2, width=9, height=3.8)
    at = [result.sizes[axis] for result in series]
    for ax, mode in zip(axes[0], (FORWARD, BACKWARD), strict=True):
        lines = [
            {one["contender"]: one for one in result.records if one["mode"] == mode}
            for result in series
        ]
        for index, name in enumerate(lines[0]):
            seconds = [1e3 * line[name]["seconds"] for line in lines]
            ax.plot(at, seconds, marker="o", markersize=3, color=color(index), label=name)
        for floor, (style, words) in FLOORS.items():
            seconds = [1e3 * line[DROPLESS][floor] for line in lines]
            ax.plot(at, seconds, style, color="#666666", label=words)
        ax.set(xlabel=axis, ylabel="ms", title=mode, yscale="log")
        ax.set_xscale("log", base=2)
        ax.set_xticks(at, [str(value) for value in at])
        ax.grid(alpha=0.3)
    labelled = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labelled, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    fixed = {name: size for name, size in series[0].sizes.items() if name != axis}
    figure.suptitle(", ".join(f"{name}={value}" for name, value in fixed.items()), fontsize=10)
    return figure


def shares(layers: list[Result]) -> Figure:
    """Share of the product's rate that every contender reaches, one panel per problem."""
    figure, axes = new_figure(len(layers), 2, width=9, height=2.6 * len(layers))
    for line, result in zip(axes, layers, strict=True):
        for ax, mode in zip(line, (FORWARD, BACKWARD), strict=True):
            records = [one for one in result.records if one["mode"] == mode][::-1]
            names = [one["contender"] for one in records]
            values = [100 * one["share"] for one in records]
            bars = ax.barh(names, values, color=[color(not n.startswith(DROPLESS)) for n in names])
            ax.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
            ax.tick_params(labelsize=8)
            ax.set(xlim=(0, 110), title=f"{described(result)}\n{mode}")
            ax.title.set_fontsize(9)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("% of the matmul rate (active experts)", fontsize=8)
    return figure


def described(result: Result) -> str:
    """The sizes in one line."""
    return ", ".join(f"{name}={size}" for name, size in Shape(**result.sizes)._asdict().items())
