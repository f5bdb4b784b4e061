"""The toy mixture: two linear experts and a gate share a boundary that neither could draw alone.

    python experiments/toy.py --out runs/toy

Half of 1,000 points surround [3, 0], half [-3, 0]; label 1 lies outside a circle that cuts through
both clouds. Two linear experts 2 -> 1 are blended by a gate 2 -> 4 -> 2, the sigmoid of the blend
is the probability of label 1, and Adam minimises the mean squared error over the full batch.

With --objective likelihood the gate blends the experts' probabilities instead, and Adam maximises
the likelihood of that mixture: experts then compete for points instead of cooperating on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import data as datasets
import moejax
from moejax import plot
from moejax.training import TrainState, init_state, train_step
from parts.command_line import (
    OneLineParser,
    at_least,
    compiled,
    output_folder,
    rounded,
    say,
    versions,
    write_json,
)
from parts.progress import progress

LEARNING_RATE = 0.01
FRAMES = 32  # of the animation


class Task(NamedTuple):
    """A mixture with what it is trained for.

    Attributes:
        init: ``key -> params``.
        probability: ``(params, x [N, 2]) -> the probability of label 1 [N]``.
        loss: ``(params, batch) -> scalar``.
    """

    init: Callable[[jax.Array], Any]
    probability: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[Any, datasets.Points], jax.Array]


def cooperating(num_experts: int) -> Task:
    """The sigmoid of the blended scores, under its mean squared error."""
    model = mixture(num_experts)

    def probability(params: Any, x: jax.Array) -> jax.Array:
        score, _ = model.apply(params, x)
        return jax.nn.sigmoid(score[:, 0])

    def loss(params: Any, batch: datasets.Points) -> jax.Array:
        return jnp.mean((probability(params, batch.x) - batch.y) ** 2)

    return Task(model.init, probability, loss)


def competing(num_experts: int) -> Task:
    """The blend of the experts' own probabilities, ``p = sum_e g_e sigmoid(s_e)``, under -log p."""

    def probability(params: Any, x: jax.Array) -> jax.Array:
        scores, logits = scores_and_logits(params, x)
        return jnp.einsum("ne,en->n", jax.nn.softmax(logits), jax.nn.sigmoid(scores))

    def loss(params: Any, batch: datasets.Points) -> jax.Array:
        scores, logits = scores_and_logits(params, batch.x)
        log_p = moejax.bernoulli_log_likelihood(scores, batch.y)
        return moejax.mixture_nll(jax.nn.log_softmax(logits), log_p)

    return Task(mixture(num_experts).init, probability, loss)


OBJECTIVES = {"squared-error": cooperating, "likelihood": competing}
LOSS_NAMES = {"squared-error": "mean squared error", "likelihood": "negative log-likelihood"}


def mixture(num_experts: int) -> moejax.Layer:
    """Linear experts 2 -> 1 and the gate 2 -> 4 -> E."""
    return moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, num_experts), num_experts=num_experts)


def scores_and_logits(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The score of every expert [E, N], and its logit in the gate [N, E]."""
    num_experts = len(params["experts"]["bias"])
    scores = moejax.stack(moejax.linear(2, 1), num_experts).apply(params["experts"], x)
    return scores[..., 0], moejax.mlp(2, 4, num_experts).apply(params["router"], x)


def objective(
    task: Task, params: Any, batch: datasets.Points, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, with the accuracy at 1/2."""
    right = (task.probability(params, batch.x) > 0.5) == (batch.y > 0.5)
    return task.loss(params, batch), {"accuracy": jnp.mean(right)}


def alone(params: Any, data: datasets.Points) -> jax.Array:
    """The accuracy if the expert with the largest gate decides each point by itself."""
    scores, logits = scores_and_logits(params, data.x)
    score = jnp.take_along_axis(scores.T, logits.argmax(axis=-1, keepdims=True), axis=-1)
    return jnp.mean((score[:, 0] > 0) == (data.y > 0.5))


def start(task: Task, key: jax.Array) -> TrainState:
    """A freshly initialised run."""
    return init_state(task.init(key), optax.adam(LEARNING_RATE), key)


def advance(
    task: Task, state: TrainState, data: datasets.Points, *, steps: int
) -> tuple[TrainState, dict[str, Any]]:
    """Full-batch steps under one scan; the history holds each step's metrics and parameters."""
    step = train_step(partial(objective, task), optax.adam(LEARNING_RATE))

    def body(state: TrainState, _: None) -> tuple[TrainState, dict[str, Any]]:
        after, metrics = step(state, data)
        return after, {"params": state.params, **metrics}

    return jax.lax.scan(body, state, length=steps)


def fit(task: Task, data: datasets.Points, steps: int, key: jax.Array) -> dict[str, jax.Array]:
    """A whole run as a pure function of its key: the loss of each step, and the last accuracies."""
    state, history = advance(task, start(task, key), data, steps=steps)
    _, metrics = objective(task, state.params, data, None)
    return {"loss": history["loss"], "alone": alone(state.params, data), **metrics}


def train(
    task: Task, data: datasets.Points, steps: int, key: jax.Array
) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
    """One run under a progress bar: the last state, the history, and what it took."""
    state = start(task, key)
    chunks = [len(chunk) for chunk in np.array_split(range(steps), min(steps, 20))]
    programs, compile_seconds = {}, 0.0
    for length in sorted(set(chunks)):
        advancing = partial(advance, task, steps=length)
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


def on_plane(task: Task, params: Any, points: np.ndarray) -> plot.Plane:
    """Every part of the mixture, evaluated on a grid around the points."""
    x, y, both = plot.grid(points)
    scores, gates, p = parts(task, params, both.astype(np.float32))
    square = lambda values: np.asarray(values).reshape(-1, len(y), len(x))  # noqa: E731
    return plot.Plane(x, y, square(scores), square(gates), square(p)[0])


@partial(jax.jit, static_argnums=0)
def parts(task: Task, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Scores of the experts [E, N], gates [E, N] and the probability [N]."""
    scores, logits = scores_and_logits(params, x)
    return scores, jax.nn.softmax(logits).T, task.probability(params, x)


def frames(
    task: Task, history: dict[str, Any], points: np.ndarray, labels: np.ndarray
) -> Iterator[Figure]:
    """The boundaries at some of the steps, closer together at first, when most happens."""
    last = len(history["loss"]) - 1
    steps = sorted({round(last * (i / (FRAMES - 1)) ** 1.5) for i in range(FRAMES)})
    for step in progress(steps, "drawing the animation"):
        params = jax.tree.map(lambda leaf, s=step: leaf[s], history["params"])
        plane = on_plane(task, params, points)
        yield plot.boundary_frame(points, labels, plane, title=f"after {step} steps")


def summarize(accuracies: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """How accuracy varies with the initial parameters."""
    return {
        "count": len(accuracies),
        "accuracy_median": np.median(accuracies),
        "accuracy_min": accuracies.min(),
        "accuracy_max": accuracies.max(),
        "top_expert_alone_median": np.median(alone),
    }


def report(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Prints the summary for a person."""
    seeds = summary["seeds"]
    lines = {
        "data": f"{args.samples:,} points",
        "mixture": f"{args.experts} linear experts, gate 2-4-{args.experts}, {args.steps} steps",
        "final loss": f"{summary['final_loss']:.4f}",
        "accuracy": f"{summary['accuracy']:.1%}",
        "top expert alone": f"{summary['top_expert_alone']:.1%}",
        "a single expert": f"{summary['single_expert_accuracy']:.1%}",
        f"over {seeds['count']} seeds": f"median {seeds['accuracy_median']:.1%}, "
        f"from {seeds['accuracy_min']:.1%} to {seeds['accuracy_max']:.1%}; "
        f"top expert alone {seeds['top_expert_alone_median']:.1%}",
        "speed": f"{summary['steps_per_second']:,.0f} steps/s "
        f"after {summary['compile_seconds']:.2f} s of compilation",
    }
    for name, value in lines.items():
        say(f"{name:<16} {value}")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--objective", choices=OBJECTIVES, default="squared-error")
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

    task = OBJECTIVES[args.objective](args.experts)
    state, history, speed = train(task, data, args.steps, model_key)
    loss, metrics = objective(task, state.params, data, None)
    # The gate of a single expert is the constant 1: what is left is that expert.
    single_task = OBJECTIVES[args.objective](1)
    single = jax.jit(partial(fit, single_task, data, args.steps))(model_key)
    fit_seeds = jax.jit(jax.vmap(partial(fit, task, data, args.steps)))
    seeds = jax.tree.map(np.asarray, fit_seeds(jax.random.split(seeds_key, args.seeds)))
    summary = {
        "objective": args.objective,
        "final_loss": loss,
        "accuracy": metrics["accuracy"],
        "top_expert_alone": alone(state.params, data),
        "single_expert_accuracy": single["accuracy"],
        "seeds": summarize(seeds["accuracy"], seeds["alone"]),
        **speed,
    }
    write_json(args.out / "summary.json", rounded(summary) | {"versions": versions()})
    report(args, summary)

    plane = on_plane(task, state.params, points)
    plot.boundaries(points, labels, plane).savefig(args.out / "boundaries.png")
    losses = {"this run": history["loss"], "a single expert": single["loss"]}
    figure = plot.loss(losses, seeds["loss"], ylabel=LOSS_NAMES[args.objective])
    figure.savefig(args.out / "loss.png")
    plot.save_animation(frames(task, history, points, labels), args.out / "training.gif")
    say(f"\nsummary.json, data.png, boundaries.png, loss.png and training.gif are in {args.out}")


if __name__ == "__main__":
    main()
