"""The command line of the language model, and what it refuses."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data.text import VOCABULARY, Text, from_files, standard_library
from language.contenders import CHOOSE_K, CONTENDERS, NETWORKS, NOT_CAUSAL, Mixture, Network
from language.training import EVALUATED_AT_ONCE
from language.transformer import Sizes
from moejax.sharding import expert_parallel, shardings
from parts import ending
from parts.command_line import (
    OneLineParser,
    add_no_cache,
    add_out,
    at_least,
    check_memory,
    positive_float,
    say,
)
from parts.devices import mesh_axes

LONGEST_SAMPLE = 10**6  # characters: a page with more of them is too large for a browser
# Filled in late: until then, None tells that an option was not given.
TRAINING = {
    "seeds": 3,
    "steps": 1500,
    "evaluate_every": 100,
    "windows": 512,
    "batch_size": 16,
    "learning_rate": 1e-2,
}
DEFAULTS = TRAINING | {"experts": 8, "top_k": 2}
TRAINING_ONLY = ("text", *TRAINING, "mesh", "resume")


def arguments(description: str) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = OneLineParser(description=description)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add_out(parser, "runs/language_model")
    add_no_cache(parser)
    add(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="your own text (default: Python's library)",
    )
    add("--model", default="all", help=f"all, or one of {', '.join(NETWORKS)} (default: all)")
    add("--seeds", type=at_least(1), help=f"runs of each model {late('seeds')}")
    add("--steps", type=at_least(1), help=f"of training {late('steps')}")
    add(
        "--evaluate-every",
        type=at_least(1),
        metavar="STEPS",
        help="steps between two looks at the validation text, and between checkpoints "
        f"{late('evaluate_every')}",
    )
    add(
        "--windows",
        type=at_least(EVALUATED_AT_ONCE),
        help=f"of the validation text, a multiple of {EVALUATED_AT_ONCE} {late('windows')}",
    )
    add("--width", type=at_least(8), default=64, help=f"features of a character {shown}")
    add("--layers", type=at_least(1), default=2, help=f"transformer blocks {shown}")
    add("--heads", type=at_least(1), default=4, help=f"attention heads {shown}")
    add(
        "--context",
        type=at_least(2),
        default=64,
        help=f"characters that a prediction can see {shown}",
    )
    add("--experts", type=at_least(1), help=f"how many experts {late('experts')}")
    add(
        "--top-k",
        type=at_least(1),
        help=f"experts per character, for rules that ask {late('top_k')}",
    )
    add("--hidden", type=at_least(1), default=64, help=f"hidden width of one expert {shown}")
    add("--batch-size", type=at_least(1), help=f"windows per step {late('batch_size')}")
    add(
        "--learning-rate",
        type=positive_float,
        help=f"the highest, of AdamW {late('learning_rate')}",
    )
    add("--mesh", type=mesh_axes, help="devices along each axis, such as data=2,expert=4")
    add("--resume", action="store_true", help="go on with the runs in --out")
    add("--sample", metavar="PROMPT", help="write on from this, by the models trained in --out")
    add(
        "--sample-length",
        type=at_least(1, LONGEST_SAMPLE),
        default=500,
        metavar="CHARACTERS",
        help=f"how long a sample is, the prompt included {shown}",
    )
    add(
        "--temperature",
        type=positive_float,
        default=0.7,
        help=f"of --sample; lower is more predictable {shown}",
    )
    args = parser.parse_args()
    refuse_what_does_nothing(parser, args)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return parser, args


def late(name: str) -> str:
    """What --help says of a default that is filled in late."""
    return f"(default: {DEFAULTS[name]})"


def refuse_what_does_nothing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that have no effect beside the others."""
    if args.sample is not None:
        for name in TRAINING_ONLY:
            if getattr(args, name):
                option = name.replace("_", "-")
                parser.error(f"--{option} does nothing with --sample, which trains nothing")
    if args.model not in NETWORKS:
        return
    if args.top_k is not None and args.model not in ("dense", *CHOOSE_K):  # dense is K as wide
        parser.error(f"--top-k does nothing with --model {args.model}")
    if args.experts is not None and args.model == "dense":
        parser.error("--experts does nothing with --model dense, which is one network")
    if args.mesh and args.model in CONTENDERS and args.model != "sparse":
        parser.error(f"--mesh does nothing with --model {args.model}, which has no experts")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is made."""
    if args.model in NOT_CAUSAL:
        parser.error(
            f"--model {args.model} cannot be used in a language model: {NOT_CAUSAL[args.model]}"
        )
    if args.model != "all" and args.model not in NETWORKS:
        parser.error(f"--model must be all or one of {', '.join(NETWORKS)}, got {args.model}")
    if args.width % (2 * args.heads):
        parser.error(
            f"--width must be an even multiple of --heads ({args.heads}), got {args.width}"
        )
    if args.model in ("all", *CHOOSE_K) and args.top_k > args.experts:
        parser.error(f"--top-k must be at most --experts ({args.experts}), got {args.top_k}")
    if args.sample is not None and len(args.sample) >= args.sample_length:
        parser.error(
            f"--sample-length must be more than the {len(args.sample)} characters of --sample, got "
            f"{args.sample_length}"
        )
    if args.windows % EVALUATED_AT_ONCE:
        parser.error(
            f"--windows must be a multiple of {EVALUATED_AT_ONCE}, which are evaluated at once, "
            f"got {args.windows}"
        )
    devices = math.prod(args.mesh.values()) if args.mesh else 1
    if args.batch_size * args.context % devices:
        parser.error(
            f"--batch-size times --context must be a multiple of the {devices} devices, got "
            f"{args.batch_size * args.context}"
        )


def check_sizes(args: argparse.Namespace) -> None:
    """Refuses a training that the machine could not hold.

    Raises:
        RefusedError: with what it would take, and what there is.
    """
    check_memory(
        memory(args),
        "--width, --layers, --experts, --hidden, --context, --batch-size or --seeds",
    )


def memory(args: argparse.Namespace) -> int:
    """The least bytes that a training takes.

    The parameters as AdamW keeps them, and once more for every seed; and for the gradient, what
    every layer has seen and where it looked.
    """
    experts = args.top_k if args.model == "dense" else args.experts
    of_a_layer = args.width * (4 * args.width + 3 * experts * args.hidden)
    parameters = args.layers * of_a_layer + VOCABULARY * args.width
    seen = args.layers * (args.width + args.heads * args.context) + VOCABULARY
    return 4 * ((3 + args.seeds) * parameters + args.batch_size * args.context * seen)


def load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Text:
    """The text, in windows of --context characters."""
    for path in args.text or ():
        if not path.is_file():
            parser.error(f"--text must name files, got nothing called {path}")
    try:
        text = (
            from_files(args.text, ", ".join(map(str, args.text)))
            if args.text
            else (standard_library())
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if min(len(text.train), len(text.validation)) <= args.context + 1:
        parser.error(f"--context must be shorter than the text, got {args.context}")
    say(
        f"{len(text.train):,} characters to train and {len(text.validation):,} others to validate, "
        f"from {text.source}"
    )
    return text


def build(args: argparse.Namespace, mesh: Mesh | None) -> dict[str, Network]:
    """The networks that compete.

    Raises:
        RefusedError: if the library can make no network of these options.
    """
    sizes = Sizes(VOCABULARY, args.width, args.layers, args.heads, args.context)
    mixture = Mixture(args.experts, args.top_k, args.hidden)
    execute = None if mesh is None else expert_parallel(mesh)
    names = list(CONTENDERS) if args.model == "all" else [args.model]
    with ending.refusals():
        networks = {name: NETWORKS[name](sizes, mixture, execute) for name in names}
        for network in networks.values():
            params = jax.eval_shape(network.init, jax.random.key(0))
            batch = jax.ShapeDtypeStruct((args.batch_size, args.context), jnp.int32)
            jax.eval_shape(network.apply, params, batch, jax.random.key(0))
            if mesh is not None:
                shardings(params, mesh)
    return networks
