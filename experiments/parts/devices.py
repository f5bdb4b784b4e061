"""The MNIST experiment on many devices: joining the other processes, the mesh, what lives where."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from moejax.sharding import shardings, token_sharding
from parts.models import Model

SECONDS_TO_MISS = 10  # how long a process may be silent before the others give up


def mesh_axes(text: str) -> dict[str, int]:
    """An argparse type: ``data=2,expert=4``."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    digits = "0123456789"
    axes = {
        name: int(size)
        for name, _, size in pairs
        if size and not size.strip(digits) and len(size) < 9 and int(size) > 0
    }
    if len(axes) != len(pairs):
        raise argparse.ArgumentTypeError(f"must be like data=2,expert=4, got {text}")
    if "expert" not in axes:
        raise argparse.ArgumentTypeError(f"must have an axis expert, as {text},expert=1 has")
    return axes


def address(text: str) -> str:
    """An argparse type: ``127.0.0.1:9876``."""
    if not re.fullmatch(r".+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(
            f"must be HOST:PORT, such as 127.0.0.1:9876, got {text or 'nothing'}"
        )
    return text


def join(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Meets the other processes of the run, before anything else touches a device."""
    if args.processes == 1:
        if args.coordinator is not None or args.process_id:
            parser.error("--coordinator and --process-id do nothing without --mesh and --processes")
        return
    if args.process_id >= args.processes:
        parser.error(f"--process-id must be below --processes ({args.processes})")
    if args.mesh is None or args.coordinator is None:
        parser.error("--processes needs --mesh and --coordinator, such as 127.0.0.1:9876")
    if args.inspect:
        parser.error("--inspect reads every parameter, so it works in one process only")
    # The service's SIGTERM handler would replace the one that saves.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process_id,
        heartbeat_timeout_seconds=SECONDS_TO_MISS,
        shutdown_timeout_seconds=SECONDS_TO_MISS,
    )


def own(out: Path) -> Path:
    """Where this process puts its records; checkpoints are written by all processes together."""
    return out / f"process-{jax.process_index()}" if jax.process_index() else out


def make_mesh(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Mesh | None:
    """The mesh that was asked for, or None for one device."""
    if args.mesh is None:
        return None
    names, shape = tuple(args.mesh), tuple(args.mesh.values())
    if math.prod(shape) != jax.device_count():
        parser.error(
            f"--mesh takes {math.prod(shape)} devices and there are {jax.device_count()}; on CPU "
            "set JAX_NUM_CPU_DEVICES to as many as this process shall have"
        )
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def spread(model: Model, mesh: Mesh | None) -> Model:
    """The model with its images spread over the mesh, padded to a multiple of its devices."""
    if mesh is None:
        return model

    def apply(
        params: Any, images: jax.Array, key: jax.Array | None, mask: jax.Array | None = None
    ) -> Any:
        count = len(images)
        more = (0, -count % mesh.size)
        mask = jnp.pad(jnp.ones(count, bool) if mask is None else mask, more)
        images = jnp.pad(images, [more, (0, 0), (0, 0)])
        images = jax.lax.with_sharding_constraint(images, token_sharding(mesh))
        outputs = model.apply(params, images, key, mask)
        return jax.tree.map(lambda leaf: leaf[:count], outputs)

    return model._replace(apply=apply)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Puts experts, with their optimizer state, on their devices, and all else on every device."""
    if mesh is None:
        return tree
    # A jitted identity, because `jax.device_put` gives no PRNG key to several processes.
    return jax.jit(lambda tree: tree, out_shardings=shardings(tree, mesh))(tree)


def shapes(tree: Any, mesh: Mesh | None) -> Any:
    """What `place` makes of arrays of these shapes, as far as compiling needs to know."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def places(state: Any, mesh: Mesh | None) -> Any:
    """Where a state and the metrics beside it stay from step to step; None for one device."""
    return None if mesh is None else (shardings(state, mesh), everywhere(mesh))


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """A copy on each device, so that every process can read it; None for one device."""
    return None if mesh is None else NamedSharding(mesh, jax.P())
