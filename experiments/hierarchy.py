"""Jacobs et al. 1991 and Jordan and Jacobs 1994: experts that compete, and trees of experts by EM.

    python experiments/hierarchy.py
    python experiments/hierarchy.py --toy-seeds 10 --seeds 3 --out runs/hierarchy_small

First the toy's two experts, trained to cooperate and to compete, and what each of them knows alone.
Then a tree of two groups of two experts on a regression with four regimes and on the toy's points,
fitted by EM and by Adam at several rates, from the same starts, in double precision. A picture and
summary.json go to --out. A run that was killed goes on with --resume.
"""

from __future__ import annotations

from parts import beginning

if __name__ == "__main__":
    beginning.prepare()  # before the imports that take seconds

import argparse
from collections.abc import Callable
from functools import partial

import jax

from parts.command_line import at_least
from studies import hierarchy_report
from studies.blocks import Cell
from studies.command import MOST_SEEDS, Study, main, seeds_option
from studies.competition import EXPERTS, OBJECTIVES, trained_and_tested
from studies.hierarchy_measures import PROBLEMS, Problem, by_em, by_gradient, measure
from studies.tree import Tree

RATES = (0.003, 0.03, 0.1)
TOY_BLOCK, BLOCK = 50, 10  # seeds under one vmap
Program = Callable[[jax.Array], dict[str, jax.Array]]
ALONE = 20  # iterations for one expert, which has no gate to learn


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    seeds_option(parser, 30, " of trees")
    add = parser.add_argument
    add(
        "--toy-seeds",
        type=at_least(1, MOST_SEEDS),
        default=100,
        help="runs of the toy (default: %(default)s)",
    )
    add(
        "--toy-steps",
        type=at_least(1),
        default=500,
        help="steps of Adam on the toy (default: %(default)s)",
    )
    add(
        "--samples",
        type=at_least(8),
        default=400,
        help="examples of a tree, to train and to test (default: %(default)s)",
    )
    add(
        "--iterations",
        type=at_least(1),
        default=100,
        help="iterations of EM (default: %(default)s)",
    )
    add(
        "--steps",
        type=at_least(1),
        default=3000,
        help="steps of Adam on trees (default: %(default)s)",
    )


def cells(args: argparse.Namespace) -> list[Cell]:
    """The toy by objective, and every problem with every fit."""
    toys = [
        Cell(
            f"toy-{name}",
            args.toy_seeds,
            TOY_BLOCK,
            over_seeds(
                partial(trained_and_tested, task=task(EXPERTS), samples=1000, steps=args.toy_steps)
            ),
        )
        for name, task in OBJECTIVES.items()
    ]
    trees = [
        Cell(f"{name}-{fit}", args.seeds, BLOCK, program)
        for name, problem in PROBLEMS.items()
        for fit, program in fits(args, problem).items()
    ]
    return toys + trees


def fits(args: argparse.Namespace, problem: Problem) -> dict[str, Program]:
    """One expert, a tree by EM, and by Adam at several rates, which share a program."""
    one = problem._replace(tree=Tree(problem.tree.width, 1, 1))
    by_adam = jax.jit(
        lambda rate, keys: jax.vmap(
            lambda key: measure(key, problem, by_gradient(rate, args.steps), args.samples)
        )(keys)
    )
    return {
        "one-expert": over_seeds(
            partial(measure, problem=one, fit=by_em(ALONE), samples=args.samples)
        ),
        "em": over_seeds(
            partial(measure, problem=problem, fit=by_em(args.iterations), samples=args.samples)
        ),
        **{f"adam-{rate:g}": partial(by_adam, rate) for rate in RATES},
    }


def over_seeds(measure: partial[dict[str, jax.Array]]) -> Program:
    """All seeds of a block side by side."""
    return jax.jit(jax.vmap(measure))


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The least bytes, by option: examples with their four leaves, and what a step leaves."""
    toys, trees = min(TOY_BLOCK, args.toy_seeds), min(BLOCK, args.seeds)
    return {
        "--toy-steps": 8 * toys * args.toy_steps,
        "--samples": 8 * trees * args.samples * 6,
        "--iterations": 8 * trees * args.iterations,
        "--steps": 8 * trees * args.steps,
    }


STUDY = Study(
    "hierarchy",
    add_options,
    cells,
    hierarchy_report.summarize,
    hierarchy_report.render,
    hierarchy_report.draw,
    memory=memory,
)

if __name__ == "__main__":
    with jax.enable_x64(True):
        main(STUDY, __doc__)
