"""Does it pay to start a mixture from a trained network?

    python experiments/upcycle.py
    python experiments/upcycle.py --epochs 5 --more-epochs 5 --seeds 3 --out runs/upcycle

A dense network learns MNIST. Then three go on: the network itself, the network upcycled to 8
experts, and the same with noise on the copies. A mixture from scratch takes as many steps as all
of that. A table shows the test accuracy at the end; curves and summary.json go to --out.
"""

from __future__ import annotations

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
from data import Dataset, Split, flat, load
from moejax.training import TrainState, batch_sizes, init_state, train_epoch, train_step
from parts.cache import keep_programs
from parts.command_line import (
    LARGEST_SEED,
    OneLineParser,
    add_arguments,
    add_data_dir,
    at_least,
    check_epochs,
    say,
    start_devices,
)
from parts.output import output_of_one_run, save_figure
from parts.progress import progress
from parts.records import versions, write_json
from studies.identity import identity_of
from studies.images import check_batch_size

NUM_EXPERTS, HIDDEN, DIGITS = 8, 50, 10
NOISE = 0.1
BALANCE = 0.01

DENSE = moejax.mlp(784, HIDDEN, DIGITS)
ROUTER = moejax.linear(784, NUM_EXPERTS)
MIXTURE = moejax.moe(DENSE, ROUTER, num_experts=NUM_EXPERTS, route=partial(moejax.top_k, k=2))
Apply = Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # params, x -> logits, extra loss
Curve = list[float]  # test accuracy after each epoch
Train = Callable[[TrainState, int], tuple[TrainState, Curve]]  # state, epochs


def dense(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The network, which has nothing to balance."""
    return DENSE.apply(params, x), jnp.zeros(())


def mixture(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mixture and its balance loss."""
    logits, routing = MIXTURE.apply(params, x)
    return logits, BALANCE * moejax.load_balancing_loss(routing)


def objective(
    apply: Apply, params: Any, batch: Split, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy plus the balance loss."""
    logits, extra = apply(params, flat(batch.images))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    return loss + extra, {"cross_entropy": loss}


def accuracy(apply: Apply, params: Any, test: Split) -> jax.Array:
    """The accuracy on all test images."""
    logits, _ = apply(params, flat(test.images))
    return jnp.mean(jnp.argmax(logits, axis=-1) == test.labels)


def trainer(
    apply: Apply, optimizer: optax.GradientTransformation, data: Dataset, batch_size: int
) -> Train:
    """A function that trains for some epochs and returns the test accuracy after each."""
    step = train_step(partial(objective, apply), optimizer)
    train, test = jax.device_put((data.train, data.test))

    @jax.jit
    def one_epoch(state: TrainState) -> tuple[TrainState, jax.Array]:
        state, _ = train_epoch(step, state, train, batch_size=batch_size)
        return state, accuracy(apply, state.params, test)

    def run(state: TrainState, epochs: int) -> tuple[TrainState, Curve]:
        curve = []
        for _ in range(epochs):
            state, accuracy = one_epoch(state)
            curve.append(float(accuracy))
        return state, curve

    return run


def measurer(args: argparse.Namespace, data: Dataset) -> Callable[[int], dict[str, Curve]]:
    """A function of a seed that makes the curves of `curves_of`; all seeds share its programs."""
    optimizer = optax.adam(1e-3)
    train_dense, train_mixture = (
        trainer(apply, optimizer, data, args.batch_size) for apply in (dense, mixture)
    )
    test = jax.device_put(data.test)
    begins = jax.jit(lambda params: accuracy(mixture, params, test))
    return partial(curves_of, args, optimizer, train_dense, train_mixture, begins)


def curves_of(
    args: argparse.Namespace,
    optimizer: optax.GradientTransformation,
    train_dense: Train,
    train_mixture: Train,
    begins: Callable[[Any], jax.Array],
    seed: int,
) -> dict[str, Curve]:
    """The four curves of one seed; upcycled mixtures begin with the dense network's parameters.

    Adam begins anew for them, while the dense network goes on with its own.
    """
    init_key, router_key, noise_key, run_key = jax.random.split(jax.random.key(seed), 4)
    first, begun = train_dense(init_state(DENSE.init(init_key), optimizer, run_key), args.epochs)
    upcycled = partial(
        moejax.upcycle, first.params, ROUTER.init(router_key), num_experts=NUM_EXPERTS
    )
    goes_on = {
        "upcycled": upcycled(),
        "upcycled with noise": upcycled(noise=NOISE, key=noise_key),
    }
    curves = {"dense": begun + train_dense(first, args.more_epochs)[1]}
    for name, params in goes_on.items():
        # Steps count on from the dense network's, so that later epochs have its order of images.
        state = init_state(params, optimizer, run_key)._replace(step=first.step)
        curves[name] = [float(begins(params)), *train_mixture(state, args.more_epochs)[1]]
    scratch = init_state(MIXTURE.init(init_key), optimizer, run_key)
    curves["from scratch"] = train_mixture(scratch, args.epochs + args.more_epochs)[1]
    return curves


def draw(curves: dict[str, np.ndarray], switched: int, path: Path) -> None:
    """Mean test accuracy over the seeds, and its range."""
    from moejax.plot import color, new_figure

    end = max(each.shape[1] for each in curves.values())
    figure, axes = new_figure(width=6, height=4)
    for index, (name, each) in enumerate(curves.items()):
        epochs = np.arange(end - each.shape[1], end) + 1
        axes[0, 0].plot(epochs, each.mean(axis=0), color=color(index), label=name)
        axes[0, 0].fill_between(
            epochs, each.min(axis=0), each.max(axis=0), color=color(index), alpha=0.2
        )
    axes[0, 0].axvline(switched, color="0.7", linestyle="--")
    axes[0, 0].annotate(" upcycled", (switched, 0.02), xycoords=("data", "axes fraction"))
    axes[0, 0].set(xlabel="epoch", ylabel="test accuracy")
    axes[0, 0].set_title("mean over seeds, and their range", size=10)
    axes[0, 0].legend()
    save_figure(figure, path)


def verdict(last: dict[str, np.ndarray]) -> str:
    """Whether upcycling paid, by the seeds' differences from each of the others."""
    upcycled = last["upcycled with noise"]
    if len(upcycled) < 2:
        return "One seed does not show whether upcycling pays."
    beaten = [name for name in ("dense", "from scratch") if (upcycled > last[name]).all()]
    if len(beaten) == 2:
        return "Upcycling paid here: better than both in every seed."
    if beaten:
        return f"Upcycling paid against {beaten[0]} alone: better in every seed."
    return "Upcycling did not pay here: better than neither in every seed."


def main() -> None:
    """Trains, compares, and says so."""
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, "runs/upcycle")
    add_data_dir(parser)
    counts = {
        "--epochs": (5, "of the dense network alone"),
        "--more-epochs": (5, "of all that go on"),
        "--batch-size": (128, "images per step"),
        "--seeds": (3, "runs of each, from --seed on"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(
            name, type=at_least(1), default=default, help=f"{text} (default: %(default)s)"
        )
    args = parser.parse_args()
    if args.seed + args.seeds - 1 > LARGEST_SEED:
        parser.error(f"--seeds must be at most {LARGEST_SEED - args.seed + 1}, got {args.seeds}")
    with ending.one_line_errors():
        keep_programs(not args.no_cache)
        start_devices()
        with output_of_one_run(args.out):
            work(args)


def work(args: argparse.Namespace) -> None:
    """The experiment."""
    with ending.refusals():
        data = load(args.data_dir)
    say(data.notice or f"Data: {data.source}")
    check_batch_size(args.batch_size, len(data.train.labels))
    steps_per_epoch = len(batch_sizes(len(data.train.labels), args.batch_size))
    epochs = args.epochs + args.more_epochs
    check_epochs(epochs, steps_per_epoch, "--epochs and --more-epochs together")
    seeds = range(args.seed, args.seed + args.seeds)
    measure = measurer(args, data)
    each = [measure(seed) for seed in progress(seeds, "seeds")]
    curves = {name: np.array([one[name] for one in each]) for name in each[0]}
    last = {name: curve[:, -1] for name, curve in curves.items()}
    say(f"{'test accuracy after all epochs':32}{'mean':>8}{'least':>8}{'most':>8}")
    for name, values in last.items():
        say(f"{name:32}{values.mean():8.4f}{values.min():8.4f}{values.max():8.4f}")
    say(verdict(last))
    draw(curves, args.epochs, args.out / "curves.png")
    lists = {name: each.tolist() for name, each in curves.items()}
    write_json(
        args.out / "summary.json",
        {
            "dataset": data.name,
            "curves": lists,
            "options": identity_of(args) | {"seeds": args.seeds},
            "versions": versions(),
        },
    )
    if data.notice:
        say(f"\n{data.notice}")


if __name__ == "__main__":
    main()
