"""The toy mixture: two linear experts and a gate share a boundary that neither could draw alone.

    python experiments/toy.py --out runs/toy

Half of 1,000 points surround [3, 0], half [-3, 0]; label 1 lies outside a circle that cuts through
both clouds. Two linear experts 2 -> 1 are blended by a gate 2 -> 4 -> 2, the sigmoid of the blend
is the probability of label 1, and Adam minimises the mean squared error over the full batch.

With --objective likelihood the gate blends the experts' probabilities instead, and Adam maximises
the likelihood of that mixture: experts then compete for points instead of cooperating on them.
"""

from __future__ import annotations

import os

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds
    # Its arrays are too small to share: a second thread would only wait for the first.
    os.environ.setdefault("PJRT_NPROC", "1")

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import moejax
from data import Points, toy
from moejax.training import TrainState, init_state, train_step
from parts.cache import keep_programs
from parts.command_line import (
    OneLineParser,
    add_arguments,
    at_least,
    check_memory,
    say,
    start_devices,
)
from parts.compiling import OWN_REDUCTIONS, QUICK_TO_COMPILE, compiled
from parts.ending import EndedError, whole_file
from parts.output import output_of_one_run, save_figure
from parts.progress import progress, waiting
from parts.records import rounded, versions, write_json

if TYPE_CHECKING:  # what draws is loaded when it draws
    from moejax.plot import Plane

LEARNING_RATE = 0.01
# All parameters as one vector: with so few of them, a kernel for each array would take longer.
OPTIMIZER = optax.flatten(optax.adam(LEARNING_RATE))
FRAMES = 16  # of the animation
GROUP = 17  # seeds that are trained side by side: 101 runs fill six groups


class Task(NamedTuple):
    """A mixture with what it is trained for.

    Attributes:
        init: ``key -> params``.
        probability: ``(params, x [N, 2]) -> the probability of label 1 [N]``.
        loss: ``(params, batch) -> scalar``.
        alone: ``(params, batch) -> the accuracy if each point's top expert decides by itself``.
    """

    init: Callable[[jax.Array], Any]
    probability: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[Any, Points], jax.Array]
    alone: Callable[[Any, Points], jax.Array]


def cooperating(num_experts: int) -> Task:
    """The sigmoid of the blended outputs, under its mean squared error."""
    model = mixture(num_experts)

    def probability(params: Any, x: jax.Array) -> jax.Array:
        output, _ = model.apply(params, x)
        return jax.nn.sigmoid(output[:, 0])

    def loss(params: Any, batch: Points) -> jax.Array:
        return jnp.mean((probability(params, batch.x) - batch.y) ** 2)

    return Task(model.init, probability, loss, alone)


def competing(num_experts: int) -> Task:
    """The blend of the experts' own probabilities, ``p = sum_e g_e sigmoid(s_e)``, under -log p."""

    def probability(params: Any, x: jax.Array) -> jax.Array:
        outputs, logits = outputs_and_logits(params, x)
        return jnp.einsum("ne,en->n", jax.nn.softmax(logits), jax.nn.sigmoid(outputs))

    def loss(params: Any, batch: Points) -> jax.Array:
        outputs, logits = outputs_and_logits(params, batch.x)
        log_p = moejax.bernoulli_log_likelihood(outputs, batch.y)
        return moejax.mixture_nll(jax.nn.log_softmax(logits), log_p)

    return Task(mixture(num_experts).init, probability, loss, alone)


def single() -> moejax.Layer:
    """What a mixture of one expert is: its gate is the constant 1."""
    return moejax.linear(2, 1)


def single_squared_error() -> Task:
    """One linear expert under the mean squared error of its sigmoid."""
    probability = single_probability

    def loss(params: Any, batch: Points) -> jax.Array:
        return jnp.mean((probability(params, batch.x) - batch.y) ** 2)

    return Task(single().init, probability, loss, single_accuracy)


def single_likelihood() -> Task:
    """One linear expert under -log p."""

    def loss(params: Any, batch: Points) -> jax.Array:
        outputs = single().apply(params, batch.x)[:, 0]
        return -jnp.mean(moejax.bernoulli_log_likelihood(outputs[None], batch.y))

    return Task(single().init, single_probability, loss, single_accuracy)


def single_probability(params: Any, x: jax.Array) -> jax.Array:
    """The probability of label 1 by one linear expert [N]."""
    return jax.nn.sigmoid(single().apply(params, x)[:, 0])


def single_accuracy(params: Any, data: Points) -> jax.Array:
    """The accuracy of one linear expert."""
    return jnp.mean((single_probability(params, data.x) > 0.5) == (data.y > 0.5))


OBJECTIVES = {"squared-error": cooperating, "likelihood": competing}
SINGLE = {"squared-error": single_squared_error, "likelihood": single_likelihood}
LOSS_NAMES = {"squared-error": "mean squared error", "likelihood": "negative log-likelihood"}


def mixture(num_experts: int) -> moejax.Layer:
    """Linear experts 2 -> 1 and the gate 2 -> 4 -> E."""
    return moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, num_experts), num_experts=num_experts)


def outputs_and_logits(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output of every expert [E, N], and its logit in the gate [N, E]."""
    num_experts = len(params["experts"]["bias"])
    outputs = moejax.stack(moejax.linear(2, 1), num_experts).apply(params["experts"], x)
    return outputs[..., 0], moejax.mlp(2, 4, num_experts).apply(params["router"], x)


def objective(
    task: Task, params: Any, batch: Points, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, with the accuracy at 1/2."""
    right = (task.probability(params, batch.x) > 0.5) == (batch.y > 0.5)
    return task.loss(params, batch), {"accuracy": jnp.mean(right)}


def alone(params: Any, data: Points) -> jax.Array:
    """The accuracy if the expert with the largest gate decides each point by itself."""
    outputs, logits = outputs_and_logits(params, data.x)
    output = jnp.take_along_axis(outputs.T, logits.argmax(axis=-1, keepdims=True), axis=-1)
    return jnp.mean((output[:, 0] > 0) == (data.y > 0.5))


def start(task: Task, key: jax.Array) -> TrainState:
    """A freshly initialised run."""
    return init_state(task.init(key), OPTIMIZER, key)


def run(task: Task, data: Points, steps: int, initial: TrainState) -> dict[str, Any]:
    """A whole run as a pure function of how it starts: full-batch steps under one scan.

    Returns:
        ``loss`` after 0..steps steps, the last ``accuracy``, the accuracy if each point's top
        expert decides ``alone``, and ``frames``, the parameters after each of `frame_steps`.
    """
    step = train_step(partial(objective, task), OPTIMIZER)
    _, from_vector = ravel_pytree(initial.params)

    def body(state: TrainState, _: None) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        after, metrics = step(state, data)
        return after, (ravel_pytree(state.params)[0], metrics["loss"])

    state, (vectors, losses) = jax.lax.scan(body, initial, length=steps)
    loss, metrics = objective(task, state.params, data, None)
    vectors = jnp.concatenate([vectors, ravel_pytree(state.params)[0][None]])
    return {
        "loss": jnp.append(losses, loss),
        "alone": task.alone(state.params, data),
        "frames": jax.vmap(from_vector)(vectors[frame_steps(steps)]),
        **metrics,
    }


def fit(task: Task, data: Points, steps: int, key: jax.Array) -> dict[str, jax.Array]:
    """A run from a key, without its parameters."""
    results = run(task, data, steps, start(task, key))
    return {name: value for name, value in results.items() if name != "frames"}


def frame_steps(steps: int) -> np.ndarray:
    """The steps that are shown, closer together at first, when most happens; the last is shown."""
    return np.unique(np.rint(steps * np.linspace(0, 1, FRAMES) ** 1.5).astype(int))


def train(
    task: Task, data: Points, steps: int, initial: TrainState
) -> tuple[dict[str, Any], dict[str, float]]:
    """A run from each of the stacked states, all by one program; and how fast they were."""
    count = len(initial.step)
    size = min(count, GROUP)

    def group(initial: TrainState, first: jax.Array) -> dict[str, Any]:
        # The last state fills up the last group. Indexing outside would compile more programs.
        together = jax.tree.map(
            lambda leaf: jnp.take(leaf, first + jnp.arange(size), axis=0, mode="clip"), initial
        )
        return jax.vmap(partial(run, task, data, steps))(together)

    with waiting("compiling the training"):
        program, compile_seconds = compiled(
            group, initial, np.int32(0), compiler_options=OWN_REDUCTIONS
        )
    began = time.perf_counter()
    what = f"training {count} seeds for {steps} steps, {size} at a time"
    groups = [
        jax.device_get(program(initial, np.int32(first)))
        for first in progress(range(0, count, size), what)
    ]
    seconds = time.perf_counter() - began
    runs = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *groups)
    check_finite(runs["loss"])
    speed = {"compile_seconds": compile_seconds, "steps_per_second": count * steps / seconds}
    return runs, speed


def check_finite(losses: np.ndarray) -> None:
    """Ends the program if training has diverged in any run."""
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=0))
    if len(bad):
        raise EndedError(f"the loss is not finite after step {bad[0]}: try another --seed")


def on_plane(task: Task, params: Any, points: np.ndarray) -> Plane:
    """Every part of the mixture, evaluated on a grid around the points."""
    x, y, both = moejax.plot.grid(points)
    outputs, gates, p = jax.device_get(parts_of(task, params, both.astype(np.float32)))
    outputs, gates, p = (
        values.reshape(*values.shape[:-1], len(y), len(x)) for values in (outputs, gates, p)
    )
    return moejax.plot.Plane(x, y, outputs, gates, p)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def parts_of(task: Task, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Outputs of the experts [E, N], gates [E, N] and the probability [N]."""
    outputs, logits = outputs_and_logits(params, x)
    return outputs, jax.nn.softmax(logits).T, task.probability(params, x)


def planes(task: Task, history: Any, steps: int, points: np.ndarray) -> Iterator[tuple[Plane, str]]:
    """The mixture at the steps that are shown, each with its title."""
    for index, step in enumerate(progress(frame_steps(steps), "drawing the animation")):
        params = jax.tree.map(lambda leaf, at=index: leaf[at], history)
        yield on_plane(task, params, points), f"after {step} steps"


def circle() -> np.ndarray:
    """The curve that separates the labels, as points [M, 2]: see `data.toy`."""
    angle = np.linspace(0, 2 * np.pi, 181)
    return np.sqrt(13) * np.stack([np.cos(angle), np.sin(angle)], axis=1) - [0, 2]


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
        "speed": f"{summary['steps_per_second']:,.0f} steps/s over all runs "
        f"after {summary['compile_seconds']:.2f} s of compilation",
    }
    for name, value in lines.items():
        say(f"{name:<16} {value}")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add_arguments(parser, out="runs/toy")
    add = parser.add_argument
    add(
        "--objective",
        choices=OBJECTIVES,
        default="squared-error",
        help="what is minimised: the squared error of the blend, under which experts cooperate, "
        "or -log of a mixture of probabilities, under which they compete (default: %(default)s)",
    )
    add("--samples", type=at_least(2), default=1000, help="how many points (default: %(default)s)")
    add("--steps", type=at_least(1), default=500, help="steps of Adam (default: %(default)s)")
    add("--experts", type=at_least(1), default=2, help="linear experts (default: %(default)s)")
    add(
        "--seeds",
        type=at_least(1),
        default=100,
        help="runs from other initial weights, to see how much is chance (default: %(default)s)",
    )
    return parser.parse_args()


def memory(args: argparse.Namespace) -> int:
    """The least bytes that the run takes: points with their outputs, and the history."""
    points = args.samples * (8 * args.experts + 20)
    history = args.steps * (8 * args.experts + 14 + args.seeds)
    return 4 * (points + history)


def main() -> None:
    """Trains, reports and draws."""
    args = arguments()
    with ending.one_line_errors():
        check_memory(memory(args), "--samples, --steps, --seeds or --experts")
        keep_programs(not args.no_cache)
        with output_of_one_run(args.out):
            start_devices()
            work(args)


def work(args: argparse.Namespace) -> None:
    """The experiment."""
    task = OBJECTIVES[args.objective](args.experts)
    data, initial, key = begin(task, args.samples, args.seeds, np.uint32(args.seed))
    points, labels = np.asarray(data.x), np.asarray(data.y)
    save_figure(moejax.plot.data(points, labels, truth=circle()), args.out / "data.png")

    runs, speed = train(task, data, args.steps, initial)
    shown = jax.tree.map(lambda leaf: leaf[0], runs)
    single_run = jax.jit(
        partial(fit, SINGLE[args.objective](), data, args.steps), compiler_options=QUICK_TO_COMPILE
    )
    alone = jax.device_get(single_run(key))
    summary = {
        "objective": args.objective,
        "final_loss": shown["loss"][-1],
        "accuracy": shown["accuracy"],
        "top_expert_alone": shown["alone"],
        "single_expert_accuracy": alone["accuracy"],
        "seeds": summarize(runs["accuracy"][1:], runs["alone"][1:]),
        **speed,
    }
    write_json(args.out / "summary.json", rounded(summary) | {"versions": versions()})
    report(args, summary)
    draw(args, task, points, labels, shown, alone, runs["loss"][1:])
    say(f"\nsummary.json, data.png, boundaries.png, loss.png and training.gif are in {args.out}")


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK_TO_COMPILE)
def begin(
    task: Task, samples: int, seeds: int, seed: np.uint32
) -> tuple[Points, TrainState, jax.Array]:
    """The points; the first states of this run and of the seeds', stacked; and this run's key."""
    data_key, model_key, seeds_key = jax.random.split(jax.random.key(seed), 3)
    keys = jnp.concatenate([model_key[None], jax.random.split(seeds_key, seeds)])
    return toy(data_key, samples), jax.vmap(partial(start, task))(keys), model_key


def draw(
    args: argparse.Namespace,
    task: Task,
    points: np.ndarray,
    labels: np.ndarray,
    shown: dict[str, Any],
    alone: dict[str, Any],
    seeds: np.ndarray,
) -> None:
    """Writes the pictures of what was trained."""
    losses = {"this run": shown["loss"], "a single expert": alone["loss"]}
    figure = moejax.plot.loss(losses, seeds, ylabel=LOSS_NAMES[args.objective])
    save_figure(figure, args.out / "loss.png")
    last = jax.tree.map(lambda leaf: leaf[-1], shown["frames"])
    figure = moejax.plot.boundaries(points, labels, on_plane(task, last, points), truth=circle())
    save_figure(figure, args.out / "boundaries.png")
    frames = moejax.plot.boundary_frames(
        points, labels, planes(task, shown["frames"], args.steps, points), truth=circle()
    )
    with whole_file(args.out / "training.gif") as path:
        moejax.plot.save_animation(frames, path)


if __name__ == "__main__":
    main()
