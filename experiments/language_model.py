"""A language model on Python's own standard library: dense, sparse, and dense at the sparse size.

    python experiments/language_model.py
    python experiments/language_model.py --model switch --seeds 1 --out runs/switch
    python experiments/language_model.py --text book.txt --out runs/book
    python experiments/language_model.py --sample "def "
    JAX_NUM_CPU_DEVICES=8 python experiments/language_model.py --model sparse --mesh data=2,expert=4

A line per evaluation says how training goes; pictures, samples and summary.json go to --out. A
run that was killed goes on with --resume.
"""

from __future__ import annotations

from parts import beginning, ending

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.text import Text, decode, encode
from language.command import arguments, build, check, check_sizes, load
from language.contenders import Network
from language.report import add_times, claim, print_table, summarize
from language.runs import (
    HEADER,
    Plan,
    Programs,
    Run,
    check_same,
    note_nothing_to_resume,
    train,
    trained,
)
from language.sampling import Sample, sample
from language.training import advance, evaluate, optimizer, start, windows_of
from parts.cache import keep_programs
from parts.command_line import say, start_devices
from parts.compiling import QUICK_TO_COMPILE
from parts.devices import everywhere, make_mesh, place, places, shapes
from parts.folders import check_named_in_utf8
from parts.output import output_of_one_run
from parts.progress import progress
from parts.records import versions, write_json
from parts.resume import check_fresh

PROMPT = "def "
# What may differ when a run is resumed: its place, its company, and what is done afterwards.
FREE_TO_DIFFER = {"out", "text", "resume", "seeds", "model", "mesh", "no_cache"} | {
    "sample",
    "sample_length",
    "temperature",
}


def compiled(
    args: argparse.Namespace, network: Network, text: jax.Array, mesh: Mesh | None
) -> Programs:
    """The programs of a network."""
    optimize = optimizer(args.learning_rate, args.steps)
    begin = jax.jit(partial(start, network, optimize), compiler_options=QUICK_TO_COMPILE)
    state = shapes(jax.eval_shape(begin, 0), mesh)
    take = partial(advance, network, optimize, args.batch_size, args.context)
    taking = jax.jit(take, out_shardings=places(state, mesh), donate_argnums=0)
    return Programs(
        begin=lambda seed: place(begin(seed), mesh),
        # Compiled here, not in the first call, whose seconds are to count its steps only.
        advance=taking.lower(state, text, np.int32(0)).compile(),
        evaluate=jax.jit(partial(evaluate, network), out_shardings=everywhere(mesh)),
    )


def plans(args: argparse.Namespace, name: str, digest: str) -> list[Plan]:
    """The runs of a model, one per seed."""
    identity = {
        f"--{option.replace('_', '-')}": str(value)
        for option, value in vars(args).items()
        if option not in FREE_TO_DIFFER
    } | {"the text": digest}
    return [
        Plan(
            name,
            seed,
            args.out / name / f"seed-{seed}" / "checkpoints",
            args.steps,
            args.evaluate_every,
            identity,
        )
        for seed in range(args.seeds)
    ]


@contextmanager
def bar(total: int) -> Iterator[Any]:
    """A bar over the steps of all runs; yields ``steps taken -> None``."""
    ticks = iter(progress(range(total), "steps", total=total))

    def tick(count: int) -> None:
        for _ in range(count):
            next(ticks, None)

    yield tick
    next(ticks, None)


def check_begin(args: argparse.Namespace, plans: list[Plan]) -> None:
    """Refuses, before anything is trained, checkpoints of an earlier run or of another one."""
    if args.resume:
        note_nothing_to_resume(plans, args.out)
    for plan in plans:
        if args.resume:
            check_same(plan)
        else:
            check_fresh(plan.folder)


def compete(
    args: argparse.Namespace, networks: dict[str, Network], text: Text, mesh: Mesh | None
) -> dict[str, list[Run]]:
    """Trains every model with every seed."""
    digest = hashlib.sha256(text.train.tobytes() + text.validation.tobytes()).hexdigest()[:16]
    every = {name: plans(args, name, digest) for name in networks}
    check_begin(args, [plan for each in every.values() for plan in each])
    windows = windows_of(text.validation, text.kinds, args.context, args.windows)
    characters, windows = place((jnp.asarray(text.train), windows), mesh)
    say("\n" + HEADER)
    with bar(args.steps * args.seeds * len(networks)) as tick:
        return {
            name: [train(plan, programs, characters, windows, tick) for plan in every[name]]
            for name, network in networks.items()
            for programs in [compiled(args, network, characters, mesh)]
        }


def report(
    args: argparse.Namespace, networks: dict[str, Network], runs: dict[str, list[Run]], text: Text
) -> None:
    """Prints, draws and writes what came of it."""
    from language.drawing import draw  # loads matplotlib, for which no step should wait

    tokens = args.batch_size * args.context
    summaries = {name: summarize(runs[name], one, tokens) for name, one in networks.items()}
    target = add_times(summaries, runs)
    print_table(summaries)
    verdict = claim(summaries) if {"dense", "sparse"} <= set(summaries) else ""
    say("\n" + verdict)
    write_json(
        args.out / "summary.json",
        {
            "models": summaries,
            "equal_loss": target,
            "claim": verdict,
            "text": text.source,
            "versions": versions(),
        },
    )
    samples = {
        name: written(args, network, jax.device_get(runs[name][0].params), PROMPT)
        for name, network in networks.items()
    }
    draw(args.out, runs, samples)


def written(args: argparse.Namespace, network: Network, params: Any, prompt: str) -> Sample:
    """What a model writes after a prompt."""
    characters = jnp.asarray(encode(prompt))
    return sample(network, params, characters, args.sample_length, args.temperature)


def write_samples(args: argparse.Namespace, networks: dict[str, Network]) -> None:
    """Prints what the trained models write after --sample, and how fast."""
    optimize = optimizer(args.learning_rate, args.steps)
    for name, network in networks.items():
        like = jax.eval_shape(partial(start, network, optimize, 0))
        params = trained(plans(args, name, "")[0], like)
        one = written(args, network, params, args.sample)
        say(f"\n{name}, {one.tokens_per_second:,.0f} characters per second:\n")
        say(decode(one.characters))


def main() -> None:
    """Trains what was asked for, reports and draws; or writes text with models already trained."""
    parser, args = arguments(__doc__.splitlines()[0])
    check(parser, args)
    with ending.one_line_errors():
        check_named_in_utf8(args.out)
        if args.sample is None:
            check_sizes(args)
        keep_programs(not args.no_cache)
        start_devices()
        mesh = make_mesh(parser, args)
        on_one_device = build(args, None)  # samples are of one token, which no mesh can share
        if args.sample is not None:
            write_samples(args, on_one_device)
            return
        with output_of_one_run(args.out):
            text = load(parser, args)
            runs = compete(args, build(args, mesh), text, mesh)
            report(args, on_one_device, runs, text)
    say(f"\nsummary, samples and pictures are in {args.out}")


if __name__ == "__main__":
    main()
