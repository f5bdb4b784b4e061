"""The comparison with PyTorch as Markdown."""

from __future__ import annotations

from typing import Any

from pytorch.ways import COMPILED, IMAGES, MOEJAX

DESCRIPTIONS = {
    "toy": "toy, 2 linear experts, Adam",
    "dense": "784-50-10, SGD",
    "soft": "soft mixture of 8, Adam",
    "sparse": "top-2 of 8, Adam",
    "language": "language model, top-2 of 8, Adam",
}
UNTIL = {"first": "first result", "whole": "end"}
PARTS = ["outputs", "gradients", "losses", "parameters"]


def table(record: dict[str, Any]) -> str:
    """Everything that is known so far: numbers, distribution, speed, command and machine."""
    sections = [numbers(record["numbers"])]
    if "seeds" in record:
        sections.append(seeds(record["seeds"]))
    if record["speed"]:
        sections.append(speed(record["speed"]))
    if record["waits"]:
        sections.append(waits(record["waits"]))
    return "\n".join([*filter(None, sections), origin(record)])


def numbers(runs: dict[str, Any]) -> str:
    """Largest differences of the same run."""
    lines = [
        "| the same run | steps | precision | outputs | gradients | loss curve | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        for precision in ("float64", "float32"):
            cells = [f"{run[precision][part]:.0e}" for part in PARTS]
            cells = [DESCRIPTIONS[name], str(run["steps"]), precision, *cells]
            lines.append("| " + " | ".join(cells) + " |")
    missed = [name for name, run in runs.items() if not run["met"]]
    text = "Largest absolute differences between PyTorch and moejax, from the same weights. "
    bounds = ", ".join(f"{run['tolerance']:.0e} ({name})" for name, run in runs.items())
    text += (
        f"The loss curves in float64 miss their tolerance: {', '.join(missed)}."
        if missed
        else f"The loss curves in float64 keep within {bounds}."
    )
    if "language" in runs:
        text += " JAX's attention takes its softmax in float32, whatever the precision."
    rounding = "; ".join(
        f"{run['rounding']['PyTorch']:.0e} and {run['rounding']['moejax']:.0e} ({name})"
        for name, run in runs.items()
    )
    text += f" What float32 itself moves the curve by, in PyTorch and in moejax: {rounding}."
    return "\n".join([*lines, "", text, ""])


def seeds(record: dict[str, Any]) -> str:
    """The test of the distributions."""
    test, farthest = record["kolmogorov_smirnov"], record["largest_difference_by_seed"]
    medians = ", ".join(f"{value:.1%} ({name})" for name, value in record["medians"].items())
    return (
        f"Accuracy of the toy over {record['seeds']} seeds: medians {medians}. "
        f"From the same initial weights no seed differs by more than {100 * farthest:.1f} points; "
        f"from their own, Kolmogorov-Smirnov gives D = {test['statistic']:.2f}, "
        f"p = {test['p_value']:.2g}.\n"
    )


def speed(races: dict[str, Any]) -> str:
    """Milliseconds of a training step in every way, and how much faster moejax is."""
    lines = [
        "| ms of a training step | PyTorch | torch.compile | moejax | times the best PyTorch | "
        "with compilation |",
        "|---|---|---|---|---|---|",
    ]
    for name, race in races.items():
        steps = {way: 1e3 * time / race["steps"] for way, time in race["median"].items()}
        eager = [
            f"{step:.3g} ({way.removeprefix('PyTorch, ')})"
            for way, step in steps.items()
            if way not in (COMPILED, MOEJAX)
        ]
        rest = [f"{steps[way]:.3g}" if way in steps else "-" for way in (COMPILED, MOEJAX)]
        speedup = f"{race['speedup']:.1f}"
        total = f"{race['speedup_with_compilation']:.1f} in {race['rounds'] + 1} rounds"
        cells = [DESCRIPTIONS[name], ", ".join(eager), *rest, speedup, total]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *disturbed(races), ""])


def waits(runs: dict[str, Any]) -> str:
    """Seconds of whole processes, from their start to the first result and to their end."""
    lines = [
        "| seconds from the start | until | best PyTorch | moejax | times | best PyTorch, programs "
        "kept | moejax, programs kept | times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        for until, words in UNTIL.items():
            cells = [DESCRIPTIONS[name], words]
            for ours in ("moejax", "moejax, programs kept"):
                best, seconds = best_pytorch(run[until], kept="kept" in ours)
                cells += [
                    f"{seconds:.1f} ({best})",
                    f"{run[until][ours]:.1f}",
                    f"{seconds / run[until][ours]:.2f}",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    text = (
        "Each row times a whole process from its start, imports and compilation included. *First "
        "result* is the loss after one epoch (100 steps of the toy), *end* the fifth. *Programs "
        "kept* means that an earlier process had compiled them."
    )
    return "\n".join([*lines, "", text, *disturbed(runs), ""])


def best_pytorch(times: dict[str, float], *, kept: bool) -> tuple[str, float]:
    """The fastest way in PyTorch and its seconds; ways that keep programs count if ``kept``."""
    theirs = {
        way.removeprefix("PyTorch, "): seconds
        for way, seconds in times.items()
        if way.startswith("PyTorch") and (kept or not way.endswith("kept"))
    }
    best = min(theirs, key=theirs.__getitem__)
    return best, theirs[best]


def disturbed(races: dict[str, Any]) -> list[str]:
    """A warning where other processes took part of the machine."""
    shares = [race["busy_elsewhere"] for race in races.values() if race["busy_elsewhere"]]
    worst = max(shares, default=0)
    if worst < 0.05:
        return []
    text = f"Other processes took up to {worst:.0%} of the machine meanwhile, which slows PyTorch"
    return ["", f"{text} more than moejax: read no ratio from this run."]


def origin(record: dict[str, Any]) -> str:
    """The command, the machine and the data."""
    machine = record["machine"]
    threads = f", {record['threads']} threads each" if "threads" in record else ""
    examples = record["examples"]
    images = next((count for name, count in examples.items() if name in IMAGES), 0)
    data = [f"{images:,} images of {record['dataset']}, batches of 128"] * bool(images)
    if "language" in examples:
        data += [f"{examples['language']:,} windows of 64 characters, batches of 16"]
    versions = f"Python {machine['python']}, jax {machine['jax']}, torch {machine['torch']}"
    where = f"`{record['command']}` on {machine['cores']} cores of {machine['processor']}{threads}"
    return f"{'; '.join([where, *data, versions])}.\n"
