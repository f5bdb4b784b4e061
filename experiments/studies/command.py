"""What the commands of all studies do: options, blocks of seeds, summary, picture, page of docs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from parts import ending
from parts.cache import keep_programs
from parts.command_line import (
    OneLineParser,
    add_arguments,
    at_least,
    check_memory,
    folder_name,
    say,
    start_devices,
)
from parts.output import output_of_one_run, save_figure
from parts.records import rounded, versions, write_json
from studies.blocks import Cell, Measured, collect
from studies.identity import identity_of
from studies.images import check_published, notice_of
from studies.page import Summary, check_page, publish


class Study(NamedTuple):
    """What a study is.

    Attributes:
        name: of its folder, and of its section of docs.
        add_options: adds the study's own options; those whose name ends in ``seeds`` may grow
            when a run is resumed.
        cells: ``options -> what is measured``.
        summarize: ``measures by cell -> summary``, plain numbers and arrays.
        render: ``summary -> the section of docs``, Markdown.
        draw: ``(summary, measures by cell) -> picture``.
        identity: ``options -> what must stay the same for a resumed run to be the same run``.
        memory: ``options -> the least bytes that a run takes``, by the option to choose smaller.
    """

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    cells: Callable[[argparse.Namespace], list[Cell]]
    summarize: Callable[[dict[str, Measured]], Summary]
    render: Callable[[Summary], str]
    draw: Callable[[Summary, dict[str, Measured]], Any]
    identity: Callable[[argparse.Namespace], dict[str, str]] = identity_of
    memory: Callable[[argparse.Namespace], dict[str, int]] = lambda options: {}


MOST_SEEDS = 10**5  # every block of them is a file


def main(study: Study, description: str) -> None:
    """Runs a study from the command line."""
    parser = OneLineParser(description=description.splitlines()[0])
    add_arguments(parser, out=f"runs/{study.name}")
    study.add_options(parser)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add(
        "--docs",
        type=folder_name,
        metavar="FOLDER",
        help="write numbers and picture into the page of studies of this folder, too",
    )
    args = parser.parse_args()
    with ending.one_line_errors():
        for option, needed in study.memory(args).items():
            check_memory(needed, option)
        keep_programs(not args.no_cache)
        if args.docs is not None:
            check_page(args.docs, study.name)
        with output_of_one_run(args.out):
            start_devices()
            work(study, args)


def work(study: Study, args: argparse.Namespace) -> None:
    """Measures, summarises, draws.

    Raises:
        RefusedError: if the results may not stand on the page.
    """
    began = time.perf_counter()
    notice = notice_of(args)
    if args.docs is not None:
        check_published(notice)
    cells, identity = study.cells(args), study.identity(args)
    measured = collect(args.out / "blocks", cells, args.seed, identity, resume=args.resume)
    summary = rounded(study.summarize(measured)) | {
        "options": identity | {"seeds": {cell.name: cell.seeds for cell in cells}},
        "versions": versions(),
        "seconds": rounded(sum(float(one["seconds"].sum()) for one in measured.values())),
    }
    write_json(args.out / "summary.json", summary)
    figure = study.draw(summary, measured)
    save_figure(figure, args.out / f"{study.name}.png")
    say("\n" + study.render(summary))
    if args.docs is not None:
        publish(args.docs, study.name, summary, figure, study.render)
    say(
        f"summary.json and {study.name}.png are in {args.out}, after "
        f"{time.perf_counter() - began:.0f} s"
    )
    if notice:
        say(f"\n{notice}")


def heads_option(parser: argparse.ArgumentParser, heads: Iterable[str]) -> None:
    """The option of which heads."""
    parser.add_argument(
        "--heads",
        choices=list(heads),
        nargs="+",
        default=list(heads),
        help="which to train (default: all)",
    )


def seeds_option(parser: argparse.ArgumentParser, default: int, what: str = "") -> None:
    """The option of how many seeds."""
    parser.add_argument(
        "--seeds",
        type=at_least(1, MOST_SEEDS),
        default=default,
        help=f"runs of each contender{what} (default: %(default)s)",
    )
