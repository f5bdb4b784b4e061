"""Seeds in blocks: what is measured is written at once, and a run that was killed goes on from it.

A cell is what a study measures over seeds, such as one contender in one setting. A block of its
seeds is one call of its function, and one file, which is whole or not there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from parts.command_line import say
from parts.ending import EndedError, RefusedError
from parts.progress import progress, waiting
from parts.records import check_same_run, versions, write_json

IDENTITY = "identity.json"
Measured = dict[str, np.ndarray]  # every measure by seed, [seeds, ...]


class Cell(NamedTuple):
    """What is measured over seeds.

    Attributes:
        name: of its files.
        seeds: how many.
        block: how many of them one call measures.
        measure: ``keys [block] -> measures``, arrays with one row per key; a function, which
            cells may share.
    """

    name: str
    seeds: int
    block: int
    measure: Callable[[jax.Array], dict[str, jax.Array]]


def collect(
    folder: Path, cells: list[Cell], seed: int, identity: dict[str, str], *, resume: bool
) -> dict[str, Measured]:
    """Measures what no file holds yet, and returns all of it by cell.

    Args:
        folder: of the blocks.
        cells: what to measure.
        seed: from which the keys of all cells follow; equal seeds see equal keys in every cell.
        identity: what must stay the same for a resumed run to be the same run.
        resume: whether blocks that are there may be used.

    Raises:
        RefusedError: if there are blocks and ``resume`` is not asked for, or they are of a run
            with another identity or none.
        EndedError: if a measure is not finite.
    """
    begin(folder, identity, resume)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(seed), np.arange(max(cell.seeds for cell in cells))
    )
    # First blocks first: a killed run then leaves every cell, with fewer seeds.
    todo = sorted(
        ((cell, rows) for cell in cells for rows in rows_of(cell)), key=lambda one: one[1].start
    )
    found: dict[str, list[Measured]] = {cell.name: [] for cell in cells}
    for cell, rows in progress(todo, "blocks of seeds"):
        path = folder / f"{cell.name}-{rows.start:03}-{rows.stop:03}.json"
        if not path.exists():
            write_json(path, measured(cell, keys[rows], rows))
        found[cell.name].append(read(path))
    return {
        name: {measure: np.concatenate([one[measure] for one in blocks]) for measure in blocks[0]}
        for name, blocks in found.items()
    }


def one_by_one(run: Callable[..., dict[str, jax.Array]]) -> jax.stages.Wrapped:
    """One run after the other: each stops when it is done, and its arrays stay in cache.

    Args:
        run: ``(key, *shared) -> measures``.

    Returns:
        A compiled function ``(*shared, keys) -> measures``, arrays with one row per key.
    """

    def over(*given: Any) -> dict[str, jax.Array]:
        *shared, keys = given
        return jax.lax.map(lambda key: run(key, *shared), keys)

    return jax.jit(over)


def rows_of(cell: Cell) -> Iterator[slice]:
    """The blocks of a cell, the last of which may be shorter."""
    for start in range(0, cell.seeds, cell.block):
        yield slice(start, min(start + cell.block, cell.seeds))


def measured(cell: Cell, keys: jax.Array, rows: slice) -> dict[str, Any]:
    """One block, with the seconds it took."""
    began = time.perf_counter()
    with waiting(f"measuring {cell.name}"):
        values = jax.device_get(cell.measure(keys))
    seconds = time.perf_counter() - began
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise EndedError(
                f"{name} of {cell.name} is not finite: try another --seed or a smaller rate"
            )
    last = f" to {rows.stop - 1}" if rows.stop - rows.start > 1 else ""
    say(f"{cell.name:<32} seed {f'{rows.start}{last}':<10} {seconds:>8.1f} s")
    # Every digit: what is read back is what was measured.
    return {name: np.asarray(value, np.float64).tolist() for name, value in values.items()} | {
        "seconds": [seconds / len(keys)] * len(keys)
    }


def read(path: Path) -> Measured:
    """The measures in a file."""
    found = {name: np.array(values) for name, values in record(path).items()}
    if "seconds" not in found:
        raise damaged(path)
    return found


def record(path: Path) -> dict[str, Any]:
    """A file of this folder."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise damaged(path) from None
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> RefusedError:
    """The error for a file that no run has written.

    Without its identity, nobody can tell what a run has measured.
    """
    advice = "choose another --out" if path.name == IDENTITY else "delete it to go on without it"
    return RefusedError(f"{path} is damaged: {advice}")


def begin(folder: Path, identity: dict[str, str], resume: bool) -> None:
    """Makes the folder with its identity, or checks that what is measured there may go on."""
    path = folder / IDENTITY
    here = versions()
    now = identity | {"the version of jax": here["jax"]}
    begun = any(folder.glob("[!.]*-*-*.json"))
    if begun and not path.exists():
        raise RefusedError(f"{folder} holds results of an unknown run: choose another --out")
    if begun and not resume:
        raise RefusedError(
            f"{folder} holds results of an earlier run: go on with it by --resume, or choose "
            "another --out"
        )
    if begun:
        check_same_run(now, record(path))
        note_other_measurements(folder / "versions.json", here)
    elif resume:
        say(f"nothing to resume in {folder}: starting from the beginning")
    folder.mkdir(exist_ok=True)
    write_json(path, now)
    write_json(folder / "versions.json", here)


def note_other_measurements(path: Path, now: dict[str, str]) -> None:
    """Says so where another machine, or other versions, measured what is there."""
    was = record(path) if path.exists() else {}
    others = [f"{name} {was[name]}" for name in was if was[name] != now.get(name)]
    if others:
        say(f"the seeds so far were measured with {', '.join(others)}")
