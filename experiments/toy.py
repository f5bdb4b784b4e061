"""The toy mixture: two linear experts and a gate share a boundary that neither could draw alone.

    python experiments/toy.py --out runs/toy

Half of 1,000 points surround [3, 0], half [-3, 0]; label 1 lies outside a circle that cuts through
both clouds. Two linear experts 2 -> 1 are blended by a gate 2 -> 4 -> 2, the sigmoid of the blend
is the probability of label 1, and Adam minimises the mean squared error over the full batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    OneLineParser,
    at_least,
    compiled,
    output_folder,
    rounded,
    say,
    versions,
    write_json,
)
from matplotlib.figure import Figure

import moejax
from moejax import datasets, plot
from moejax.progress import progress
from moejax.training import TrainState, init_state, train_step

LEARNING_RATE = 0.01
FRAMES = 32  # of the animation


def mixture(num_experts: int) -> moejax.Layer:
    """Linear experts 2 -> 1 and the gate 2 -> 4 -> E."""
    return moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, num_experts), num_experts=num_experts)


def probability(model: moejax.Layer, params: Any, x: jax.Array) -> jax.Array:
    """The probability of label 1, the sigmoid of the gated sum, [N]."""
    score, _ = model.apply(params, x)
    return jax.nn.sigmoid(score[:, 0])


def squared_error(
    model: moejax.Layer, params: Any, batch: datasets.Points, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the probability, with the accuracy at 1/2."""
    p = probability(model, params, batch.x)
    return jnp.mean((p - batch.y) ** 2), {"accuracy": jnp.mean((p > 0.5) == (batch.y > 0.5))}


def start(model: moejax.Layer, key: jax.Array) -> TrainState:
    """A freshly initialised run."""
    return init_state(model.init(key), optax.adam(LEARNING_RATE), key)


def advance(
    model: moejax.Layer, state: TrainState, data: datasets.Points, *, steps: int
) -> tuple[TrainState, dict[str, Any]]:
    """Full-batch steps under one scan; the history holds each step's metrics and parameters."""
    step = train_step(partial(squared_error, model), optax.adam(LEARNING_RATE))

    def body(state: TrainState, _: None) -> tuple[TrainState, dict[str, Any]]:
        after, metrics = step(state, data)
        return after, {"params": state.params, **metrics}

    return jax.lax.scan(body, state, length=steps)


def fit(
    model: moejax.Layer, data: datasets.Points, steps: int, key: jax.Array
) -> dict[str, jax.Array]:
    """A whole run as a pure function of its key: the loss of each step, and the last accuracy."""
    state, history = advance(model, start(model, key), data, steps=steps)
    _, metrics = squared_error(model, state.params, data, None)
    return {"loss": history["loss"], "accuracy": metrics["accuracy"]}


def train(
    model: moejax.Layer, data: datasets.Points, steps: int, key: jax.Array
) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
    """One run under a progress bar: the last state, the history, and what it took."""
    state = start(model, key)
    chunks = [len(chunk) for chunk in np.array_split(range(steps), min(steps, 20))]
    programs, compile_seconds = {}, 0.0
    for length in sorted(set(chunks)):
        advancing = partial(advance, model, steps=length)
        programs[length], seconds = compiled(advancing, state, data)
        compile_seconds += seconds
    histories = []
    began = time.perf_counter()
    for length in progress(chunks, f"training, {steps} steps"):
        state, history = programs[length](state, data)
        histories.append(history)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    history = jax.tree.map(lambda *parts: np.concatenate(parts), *histories)
    return state, history, {"compile_seconds": compile_seconds, "steps_per_second": steps / seconds}


def on_plane(model: moejax.Layer, params: Any, points: np.ndarray) -> plot.Plane:
    """Every part of the mixture, evaluated on a grid around the points."""
    x, y, both = plot.grid(points)
    scores, gates, p = parts(model, params, both.astype(np.float32))
    square = lambda values: np.asarray(values).reshape(-1, len(y), len(x))  # noqa: E731
    return plot.Plane(x, y, square(scores), square(gates), square(p)[0])


@partial(jax.jit, static_argnums=0)
def parts(model: moejax.Layer, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Scores of the experts [E, N, 1], gates [E, N] and the probability [N]."""
    expert = moejax.linear(2, 1).apply
    scores = jax.vmap(expert, in_axes=(0, None))(params["experts"], x)
    _, routing = model.apply(params, x)
    return scores, routing.weights.T, probability(model, params, x)


def frames(
    model: moejax.Layer, history: dict[str, Any], points: np.ndarray, labels: np.ndarray
) -> Iterator[Figure]:
    """The boundaries at some of the steps, closer together at first, when most happens."""
    last = len(history["loss"]) - 1
    steps = sorted({round(last * (i / (FRAMES - 1)) ** 1.5) for i in range(FRAMES)})
    for step in progress(steps, "drawing the animation"):
        params = jax.tree.map(lambda leaf, s=step: leaf[s], history["params"])
        plane = on_plane(model, params, points)
        yield plot.boundary_frame(points, labels, plane, title=f"after {step} steps")


def summarize(accuracies: np.ndarray) -> dict[str, Any]:
    """How accuracy varies with the initial parameters."""
    return {
        "count": len(accuracies),
        "accuracy_median": np.median(accuracies),
        "accuracy_min": accuracies.min(),
        "accuracy_max": accuracies.max(),
    }


def report(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Prints the summary for a person."""
    seeds = summary["seeds"]
    lines = {
        "data": f"{args.samples:,} points",
        "mixture": f"{args.experts} linear experts, gate 2-4-{args.experts}, {args.steps} steps",
        "final loss": f"{summary['final_loss']:.4f}",
        "accuracy": f"{summary['accuracy']:.1%}",
        "a single expert": f"{summary['single_expert_accuracy']:.1%}",
        f"over {seeds['count']} seeds": f"median {seeds['accuracy_median']:.1%}, "
        f"from {seeds['accuracy_min']:.1%} to {seeds['accuracy_max']:.1%}",
        "speed": f"{summary['steps_per_second']:,.0f} steps/s "
        f"after {summary['compile_seconds']:.2f} s of compilation",
    }
    for name, value in lines.items():
        say(f"{name:<16} {value}")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--samples", type=at_least(2), default=1000)
    parser.add_argument("--steps", type=at_least(1), default=500)
    parser.add_argument("--experts", type=at_least(1), default=2)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--seeds", type=at_least(1), default=100)
    args = parser.parse_args()
    output_folder(parser, args.out)
    return args


def main() -> None:
    """Trains, reports and draws."""
    args = arguments()
    data_key, model_key, seeds_key = jax.random.split(jax.random.key(args.seed), 3)
    data = datasets.toy(data_key, args.samples)
    points, labels = np.asarray(data.x), np.asarray(data.y)
    plot.data(points, labels).savefig(args.out / "data.png")

    model = mixture(args.experts)
    state, history, speed = train(model, data, args.steps, model_key)
    loss, metrics = squared_error(model, state.params, data, None)
    # The gate of a single expert is the constant 1: what is left is that expert.
    single = jax.jit(partial(fit, mixture(1), data, args.steps))(model_key)
    fit_seeds = jax.jit(jax.vmap(partial(fit, model, data, args.steps)))
    seeds = jax.tree.map(np.asarray, fit_seeds(jax.random.split(seeds_key, args.seeds)))
    summary = {
        "final_loss": loss,
        "accuracy": metrics["accuracy"],
        "single_expert_accuracy": single["accuracy"],
        "seeds": summarize(seeds["accuracy"]),
        **speed,
    }
    write_json(args.out / "summary.json", rounded(summary) | {"versions": versions()})
    report(args, summary)

    plane = on_plane(model, state.params, points)
    plot.boundaries(points, labels, plane).savefig(args.out / "boundaries.png")
    losses = {"this run": history["loss"], "a single expert": single["loss"]}
    plot.loss(losses, seeds["loss"]).savefig(args.out / "loss.png")
    plot.save_animation(frames(model, history, points, labels), args.out / "training.gif")
    say(f"\nsummary.json, data.png, boundaries.png, loss.png and training.gif are in {args.out}")


if __name__ == "__main__":
    main()
