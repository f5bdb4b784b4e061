"""MNIST with one network or a mixture of experts: blended, sparse or one per image.

    python experiments/mnist.py
    python experiments/mnist.py --model all --out runs/all
    python experiments/mnist.py --route relu --out runs/relu
    python experiments/mnist.py --model dense --hidden 50 --optimizer sgd --batch-size 60000 \
        --epochs 3 --inspect
    JAX_NUM_CPU_DEVICES=8 python experiments/mnist.py --model sparse --mesh data=2,expert=4

A line per epoch says how training goes; pictures, metrics.jsonl and summary.json go to --out.
"""

from __future__ import annotations

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import parts.resume as resumable
from data import Dataset, Split, digits, load, mnist
from moejax.diagnostics import (
    confidence,
    effective_experts,
    expert_by_class,
    expert_load,
    gate_entropy,
    mutual_information,
)
from moejax.sharding import expert_parallel, shardings
from moejax.training import (
    Masked,
    Step,
    TrainState,
    batch_sizes,
    empty_metrics,
    epoch_order,
    init_state,
    inspect_step,
    train_step,
    train_until,
)
from parts.cache import keep_programs
from parts.command_line import (
    OneLineParser,
    add_arguments,
    add_data_dir,
    at_least,
    check_epochs,
    check_memory,
    positive_float,
    say,
    start_devices,
)
from parts.compiling import QUICK_TO_COMPILE, compile_in_background, compiled, timed
from parts.devices import (
    address,
    everywhere,
    join,
    make_mesh,
    mesh_axes,
    own,
    place,
    places,
    shapes,
    spread,
)
from parts.ending import EndedError
from parts.models import (
    CONVOLVED,
    DIGITS,
    EXPERTS,
    MODELS,
    PIXELS,
    RUN_ALL,
    TAKE_TOP_K,
    Model,
    by_rule,
)
from parts.output import make_writable, output_of_one_run
from parts.progress import waiting
from parts.records import write_json
from parts.reports import (
    HEADER,
    LINE,
    Run,
    compare,
    draw,
    epoch_record,
    forget_earlier_run,
    print_step,
    summarize,
)
from parts.resume import Progress, metrics_log, pauses
from parts.routes import ROUTES, asks_for_k

OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd}
FROM_FOLDERS = ("auto", "mnist")
DATASETS = {"auto": load, "mnist": mnist, "digits": lambda _: digits()}


def objective(
    model: Model,
    params: Any,
    batch: Split,
    key: jax.Array | None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy plus the balance losses; the metrics hold the cross-entropy alone."""
    logits, routing = model.apply(params, batch.images, key, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.mean(losses, where=mask)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels, where=mask)
    return loss + model.balance(routing), {"cross_entropy": loss, "accuracy": accuracy}


def masked_objective(
    model: Model, params: Any, batch: Masked, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective over the images that count, so that one program takes every batch."""
    return objective(model, params, batch.data, key, batch.mask)


def evaluate(model: Model, params: Any, split: Split) -> dict[str, Any]:
    """The whole split in one batch: loss, accuracy, confusion, and what the gate did."""
    logits, routing = model.apply(params, split.images, None)
    predicted = jnp.argmax(logits, axis=-1)
    confusion = jnp.zeros((DIGITS, DIGITS), jnp.int32).at[split.labels, predicted].add(1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    result = {
        "loss": losses.mean(),
        "accuracy": jnp.mean(predicted == split.labels),
        "confusion": confusion,
    }
    if routing is None:
        return result
    by_class = expert_by_class(routing, jnp.asarray(split.labels), DIGITS)
    load = by_class.sum(axis=1) / by_class.sum()
    return result | {
        "gate_entropy": gate_entropy(routing),
        "confidence": confidence(routing),
        "effective_experts": effective_experts(routing),
        # By share of the gate: where every image chooses every expert, none is without choices.
        "dead_experts": jnp.sum(load < 0.05 / len(load)),
        "mutual_information": mutual_information(by_class),
        "expert_load": load,  # share of the gate
        "choice_load": expert_load(routing),  # share of the choices
        "by_class": by_class,
        "top_expert": jnp.take_along_axis(
            routing.experts, routing.weights.argmax(axis=-1, keepdims=True), axis=-1
        )[:, 0],
    }


def start(model: Model, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, a function of the seed."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_state(model.init(init_key), optimizer, run_key)


def compile_start(
    args: argparse.Namespace, model: Model
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Compiles in the background what makes the first state.

    Returns:
        The shapes of the state, and a function that makes it.
    """
    optimizer = OPTIMIZERS[args.optimizer](args.learning_rate)
    initial = jax.jit(
        partial(start, model, optimizer, args.seed), compiler_options=QUICK_TO_COMPILE
    )
    coming = jax.eval_shape(initial)
    programs = compile_in_background((initial, ()))

    def state() -> TrainState:
        [make], _ = programs()
        return make()

    return coming, state


def begin_compiling(
    step: Step, state: TrainState, train: Masked, batch_size: int, mesh: Mesh | None
) -> Callable[[], tuple[list[jax.stages.Compiled], float]]:
    """Compiles what takes the steps and what shuffles, from the state's shapes."""
    unseen = jax.eval_shape(partial(empty_metrics, step, batch_size=batch_size), state, train)
    shuffle = jax.jit(
        partial(epoch_order, num_examples=len(train.mask)),
        out_shardings=everywhere(mesh),
        compiler_options=QUICK_TO_COMPILE,
    )
    order = jax.ShapeDtypeStruct(train.mask.shape, jnp.int32)
    advance = jax.jit(
        partial(train_until, step, batch_size=batch_size), out_shardings=places(state, mesh)
    )
    unseen, order = shapes((unseen, order), mesh)
    return compile_in_background(
        (advance, (state, unseen, train, order, np.int32(0))), (shuffle, (state, np.int32(0)))
    )


def compile_test(model: Model, params: Any, test: Split, mesh: Mesh | None) -> jax.stages.Compiled:
    """Compiles `evaluate` for these shapes."""
    options = {"out_shardings": everywhere(mesh), "compiler_options": QUICK_TO_COMPILE}
    return compiled(partial(evaluate, model), params, test, **options)[0]


def train(
    args: argparse.Namespace,
    model: Model,
    first: tuple[TrainState, Callable[[], TrainState]],
    plan: resumable.Plan,
    data: Dataset,
    mesh: Mesh | None,
) -> Run:
    """Trains one model, with a line per epoch on the screen and in metrics.jsonl."""
    out = plan.folder.parent
    optimizer = OPTIMIZERS[args.optimizer](args.learning_rate)
    step = train_step(partial(masked_objective, model), optimizer)
    coming, initial = shapes(first[0], mesh), first[1]
    mask = jax.device_put(np.ones(len(data.train.labels), bool))  # `jnp.ones` would be compiled
    split = place(Masked(data.train, mask), mesh)
    programs = begin_compiling(step, coming, split, args.batch_size, mesh)
    state = place(initial(), mesh)
    sizes = batch_sizes(len(data.train.labels), args.batch_size)
    unseen = place(empty_metrics(step, state, split, batch_size=args.batch_size), mesh)
    progress = resumable.begin(plan, args.resume, Progress(state, unseen, [], 0.0))
    for folder in {own(args.out), own(out)}:
        forget_earlier_run(folder)
    write_json(
        own(args.out) / "config.json", {name: str(value) for name, value in vars(args).items()}
    )
    if args.inspect:
        rows = epoch_order(state, 0, len(data.train.labels))[: args.batch_size]
        batch = jax.tree.map(lambda leaf: leaf[rows], data.train)
        print_step(inspect_step(partial(objective, model), optimizer, state, batch))
    with waiting("compiling the training step"):
        (take_steps, shuffle), compile_seconds = programs()
    # While the device takes its steps, the test gets ready, and then what draws.
    test_program = cache(partial(compile_test, model, coming.params, data.test, mesh))
    advance = timed(take_steps, test_program, try_drawing)
    test = None
    say("\n" + HEADER)
    log_path = own(out) / "metrics.jsonl"
    with pauses(plan) as pause, metrics_log(log_path, progress.history) as log:
        for number in range(len(progress.history) + 1, args.epochs + 1):
            progress = finish_epoch(plan, pause, advance, shuffle, split, progress)
            test = jax.device_get(test_program()(progress.state.params, data.test))
            check_finite(np.atleast_1d(test["loss"]), progress.step - 1)  # after the last step
            record = epoch_record(number, sizes, progress.metrics, test, progress.seconds)
            log.write(json.dumps(record) + "\n")
            log.flush()
            say(LINE.format(**record))
            progress = Progress(progress.state, unseen, [*progress.history, record], 0.0)
            pause(progress)
    if test is None:  # resumed when all was done
        test = jax.device_get(test_program()(progress.state.params, data.test))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Run(progress.history, test, parameters, compile_seconds)


def finish_epoch(
    plan: resumable.Plan,
    pause: resumable.Pause,
    advance: Callable[..., tuple[Any, float]],
    shuffle: Callable[..., jax.Array],
    split: Masked,
    progress: Progress,
) -> Progress:
    """Takes the remaining steps of an epoch, in one go or with pauses in which the run is saved."""
    steps = len(progress.metrics["loss"])
    order = shuffle(progress.state, np.int32(len(progress.history)))
    end = (len(progress.history) + 1) * steps
    while progress.step < end:
        stop = np.int32(resumable.next_stop(plan, progress.step, end))
        (state, metrics), seconds = advance(progress.state, progress.metrics, split, order, stop)
        check_finite(metrics["loss"], end - steps)
        progress = Progress(state, metrics, progress.history, progress.seconds + seconds)
        if progress.step < end:
            pause(progress)
    return progress


def check_finite(losses: jax.Array | np.ndarray, before: int) -> None:
    """Ends the program if training has diverged."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise EndedError(
            f"the loss is not finite at step {before + bad[0] + 1}: try a smaller --learning-rate"
        )


def try_drawing() -> None:
    """Draws a picture early, so that at most one epoch is lost if drawing fails."""
    from moejax import plot

    plot.new_figure(width=1, height=1)[0].canvas.draw()


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, checked."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add_arguments(parser, out="runs/mnist")
    add = parser.add_argument
    add_data_dir(parser)
    add(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto takes what there is; the others insist (default: %(default)s)",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        choices=[*MODELS, "all"],
        default="soft",
        help="one network, a blend of all experts, the best few with noise, one expert per image, "
        "or all of these one after the other (default: %(default)s)",
    )
    model.add_argument(
        "--route", choices=ROUTES, help="a mixture with this rule instead of --model"
    )
    add("--experts", type=at_least(1), help="how many experts (default: 8)")
    add("--top-k", type=at_least(1), help="experts per image, for rules that ask (default: 2)")
    add(
        "--expert",
        choices=EXPERTS,
        default="mlp",
        help="what each expert is: two dense layers, or a convolutional network "
        "(default: %(default)s)",
    )
    add(
        "--hidden",
        type=at_least(1),
        default=128,
        help="hidden width of every network (default: %(default)s)",
    )
    add("--epochs", type=at_least(1), default=5, help="passes over the data (default: %(default)s)")
    add(
        "--batch-size", type=at_least(1), default=128, help="images per step (default: %(default)s)"
    )
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="how the weights are updated (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=1e-3,
        help="how far a step goes (default: %(default)s)",
    )
    add(
        "--mesh",
        type=mesh_axes,
        metavar="AXES",
        help="devices along each axis, such as data=2,expert=4 (default: one device)",
    )
    add(
        "--coordinator",
        type=address,
        metavar="HOST:PORT",
        help="of process 0, such as 127.0.0.1:9876",
    )
    add(
        "--processes",
        type=at_least(1),
        default=1,
        help="processes that share the mesh (default: %(default)s)",
    )
    add(
        "--process-id",
        type=at_least(0),
        default=0,
        help="which of them this one is, from 0 (default: %(default)s)",
    )
    add("--inspect", action="store_true", help="print what the first step does to every parameter")
    resumable.add_arguments(parser)
    args = parser.parse_args()
    refuse_what_does_nothing(parser, args)
    if args.model == "all" and not args.route and args.resume not in (None, resumable.NEWEST):
        parser.error("--resume STEP goes with one --model: it deletes what came after the step")
    args.experts = 8 if args.experts is None else args.experts
    args.top_k = 2 if args.top_k is None else args.top_k
    return parser, args


def refuse_what_does_nothing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that have no effect beside the others."""
    what = f"--route {args.route}" if args.route else f"--model {args.model}"
    asks = asks_for_k(ROUTES[args.route]) if args.route else args.model in (*TAKE_TOP_K, "all")
    if args.top_k is not None and not asks:
        parser.error(f"--top-k does nothing with {what}, which settles how many experts serve")
    if args.experts is not None and what == "--model dense":
        parser.error("--experts does nothing with --model dense, which is one network")
    if args.data_dir is not None and args.dataset not in FROM_FOLDERS:
        parser.error(f"--data-dir does nothing with --dataset {args.dataset}")


def memory(args: argparse.Namespace) -> int:
    """The least bytes that the run takes: parameters as Adam keeps them, and activations."""
    experts = 1 if args.model == "dense" and not args.route else args.experts
    parameters = experts * (PIXELS * args.hidden + args.hidden * DIGITS + PIXELS)
    served_by = experts if (args.route or args.model) in RUN_ALL else 1
    activations = served_by * args.batch_size * (2 * args.hidden + CONVOLVED[args.expert])
    return 4 * (4 * parameters + activations)


def load_images(args: argparse.Namespace) -> Dataset:
    """The data, as NumPy arrays."""
    with ending.refusals():
        data = DATASETS[args.dataset](args.data_dir)
        batch_sizes(len(data.train.labels), args.batch_size)
    say(
        f"{data.name}: {len(data.train.labels):,} images to train, {len(data.test.labels):,} to "
        f"test, from {data.source}"
    )
    return data


def build(args: argparse.Namespace, mesh: Mesh | None) -> dict[str, Model]:
    """The models to train, each tried out on the shape of one image, so that errors come now."""
    kind = EXPERTS[args.expert](args.hidden)
    execute = None if mesh is None else expert_parallel(mesh)
    names = MODELS if args.model == "all" else [args.model]
    makers = {name: MODELS[name] for name in names}
    if args.route:
        makers = {args.route: partial(by_rule, args.route)}
    models = {
        name: spread(make(kind, args.experts, args.top_k, execute), mesh)
        for name, make in makers.items()
    }
    key, image = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((1, 28, 28), jnp.uint8)
    for model in models.values():
        with ending.refusals():
            params = jax.eval_shape(model.init, key)
            jax.eval_shape(model.apply, params, image, None)
            if mesh is not None:
                shardings(params, mesh)
    return models


def main() -> None:
    """Trains what was asked for, reports and draws."""
    parser, args = arguments()
    with ending.one_line_errors():
        check_memory(memory(args), "--experts, --hidden or --batch-size")
        keep_programs(not args.no_cache)
        join(parser, args)
        start_devices()
        mesh = make_mesh(parser, args)
        models = build(args, mesh)
        with output_of_one_run(own(args.out)):
            work(args, models, mesh)


def work(args: argparse.Namespace, models: dict[str, Model], mesh: Mesh | None) -> None:
    """The experiment."""
    with ThreadPoolExecutor(1) as pool:
        images = pool.submit(load_images, args)
        # While they are read, what needs none is compiled.
        first = {name: compile_start(args, model) for name, model in models.items()}
        data = images.result()
    check_epochs(args.epochs, len(batch_sizes(len(data.train.labels), args.batch_size)))
    on_device = data._replace(
        train=jax.device_put(data.train), test=place(jax.device_put(data.test), mesh)
    )
    outs = {name: args.out / name if args.model == "all" else args.out for name in models}
    plans = {name: checked_plan(args, out, data) for name, out in outs.items()}
    runs = {}
    for name, model in models.items():
        out = outs[name]
        make_writable(own(out))
        say(f"\n{describe(args, name)}")
        runs[name] = train(args, model, first[name], plans[name], on_device, mesh)
        write_json(own(out) / "summary.json", summarize(runs[name], name, data.name))
        with waiting("drawing"):
            draw(runs[name], name, data.test.images, own(out))
    if args.model == "all":
        compare(runs, own(args.out))
        summaries = {name: summarize(run, name, data.name) for name, run in runs.items()}
        write_json(own(args.out) / "summary.json", {"dataset": data.name, "models": summaries})
    say(f"\nmetrics, summary and pictures are in {args.out}")
    if data.notice:
        say(f"\n{data.notice}")


def checked_plan(args: argparse.Namespace, out: Path, data: Dataset) -> resumable.Plan:
    """What is saved when, and where; refuses a resume that cannot be."""
    steps_per_epoch = len(batch_sizes(len(data.train.labels), args.batch_size))
    plan = resumable.plan(args, out, data, steps_per_epoch)
    resumable.check(plan, args.resume)
    return plan


def describe(args: argparse.Namespace, name: str) -> str:
    """The run in one line."""
    experts = "" if name == "dense" else f"{args.experts} experts, "
    return (
        f"{name}: {experts}{args.expert} with {args.hidden} hidden units, {args.optimizer} at "
        f"{args.learning_rate:g}, batches of {args.batch_size}"
    )


if __name__ == "__main__":
    main()
