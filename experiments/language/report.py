"""What the runs say: a summary, a table, and whether the claim holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from language.contenders import Network, count
from language.runs import Run
from parts.command_line import say
from parts.records import rounded

Runs = dict[str, list[Run]]  # for each model one run per seed
HEAD = (
    "model           active      total  validation loss     steps to   seconds to     seconds  "
    "    tokens  dead\n"
    "            parameters parameters                     equal loss   equal loss   per step  "
    "per second"
)


def losses(runs: list[Run]) -> np.ndarray:
    """Validation loss by seed and evaluation, [seeds, evaluations]."""
    return np.array([[one["validation_loss"] for one in run.history] for run in runs])


def seconds(runs: list[Run]) -> np.ndarray:
    """Seconds of training by seed and evaluation, [seeds, evaluations]."""
    return np.array([[one["seconds"] for one in run.history] for run in runs])


def steps(runs: list[Run]) -> np.ndarray:
    """The step of every evaluation."""
    return np.array([one["step"] for one in runs[0].history])


def summarize(runs: list[Run], network: Network, tokens_per_step: int) -> dict[str, Any]:
    """What summary.json says about a model."""
    active, total = count(network)
    per_step = float(np.median(seconds(runs)[:, -1])) / int(steps(runs)[-1])
    final = losses(runs)[:, -1]
    routers = {
        name: [run.results[name] for run in runs]
        for name in ("load", "dead_experts")
        if name in runs[0].results
    }
    return rounded(
        {
            "active_parameters": active,
            "total_parameters": total,
            "validation_loss": final,
            "validation_loss_mean": final.mean(),
            "validation_loss_std": final.std(ddof=1) if len(final) > 1 else None,
            "seconds_per_step": per_step,
            "tokens_per_second": tokens_per_step / per_step,
            **routers,
        }
    )


def time_to(target: float, runs: list[Run]) -> tuple[int | None, float | None]:
    """Steps and seconds until the mean over seeds reaches a loss; None if it never does."""
    mean = losses(runs).mean(axis=0)
    reached = np.flatnonzero(mean <= target)
    if not len(reached):
        return None, None
    first = reached[0]
    return int(steps(runs)[first]), float(seconds(runs).mean(axis=0)[first])


def add_times(summaries: dict[str, dict[str, Any]], runs: Runs) -> float:
    """Adds the steps and seconds to equal loss: to the worst final loss, which all models reach."""
    # The mean as `time_to` takes it: summing in another order may change the last bit.
    target = max(losses(each).mean(axis=0)[-1] for each in runs.values())
    for name, each in runs.items():
        to_target = time_to(target, each)
        summaries[name] |= rounded(
            {"steps_to_equal_loss": to_target[0], "seconds_to_equal_loss": to_target[1]}
        )
    return float(target)


def claim(summaries: dict[str, dict[str, Any]]) -> str:
    """Whether the sparse model beats the dense one of equal active parameters."""
    dense, sparse = summaries["dense"], summaries["sparse"]
    gap = dense["validation_loss_mean"] - sparse["validation_loss_mean"]
    if len(sparse["validation_loss"]) < 2:
        return (
            f"sparse against dense at equal active parameters: {gap:+.4f} nats per character; one "
            "seed shows no difference"
        )
    spread = max(dense["validation_loss_std"], sparse["validation_loss_std"])
    numbers = (
        f"{gap:+.4f} nats per character, {len(sparse['validation_loss'])} seeds, the larger "
        f"standard deviation {spread:.4f}"
    )
    if gap > 3 * spread:
        return f"sparse beats dense at equal active parameters: {numbers}"
    return (
        "sparse does NOT beat dense at equal active parameters by three standard deviations: "
        f"{numbers}"
    )


def print_table(summaries: dict[str, dict[str, Any]]) -> None:
    """One line per model."""
    say("\n" + HEAD)
    for name, one in summaries.items():
        dead = sum(map(sum, one["dead_experts"])) if "dead_experts" in one else "-"
        spread = one["validation_loss_std"]
        spread = "-" if spread is None else f"{spread:.4f}"
        say(
            f"{name:<12} {one['active_parameters']:>9,} {one['total_parameters']:>10,}  "
            f"{one['validation_loss_mean']:.4f} +- {spread:<6} "
            f"{one['steps_to_equal_loss']:>12,} {one['seconds_to_equal_loss']:>12.1f} "
            f"{one['seconds_per_step']:>10.4f} {one['tokens_per_second']:>11,.0f} {dead:>5}"
        )
