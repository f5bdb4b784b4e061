"""One block of a checkpoint folder, read tensor by tensor and written back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax._files import written_whole
from moejax._paths import local
from moejax.base import Params
from moejax.interop.safetensors import library
from moejax.interop.torch import Layout, to_torch
from moejax.interop.torch.checks import check_layout
from moejax.interop.torch.state_dicts import read
from moejax.interop.transformers.families import build
from moejax.interop.transformers.fields import as_dict, read_json, refuse
from moejax.interop.transformers.pieces import Block

Files = Mapping[str, Path]  # which file holds a tensor, by the tensor's name
Folder = str | os.PathLike[str]


def load(folder: Folder, layer: int, *, prefix: str | None = None, config: Any = None) -> Params:
    """Reads the params of one block from a checkpoint.

    It reads tensor by tensor, so it needs memory for the block and one tensor only.

    Args:
        folder: a folder with a ``config.json`` and safetensors files, with an index if several.
        layer: which layer of the model, from 0.
        prefix: the module of the mixture, such as ``model.layers.3.mlp``; by default the one in
            that layer whose tensors are named as in a checkpoint or as in the installed module.
        config: as for `block`; needed where the folder's ``config.json`` leaves out fields that
            have their default.

    Returns:
        Params for the layer of ``block(folder)``, NumPy arrays with the dtypes of the files.

    Raises:
        ValueError: if the model is not supported or quantised, or if the layer has no such block,
            or several, or one with other shapes or with tensors that the configuration leaves out.
        ImportError: without safetensors; names the command that installs it.

    Example:
        >>> layer, layout = block(folder)  # doctest: +SKIP
        >>> params = load(folder, 3)  # doctest: +SKIP
    """
    block = _block(folder if config is None else config)
    with _opened(folder) as (files, get):
        start, layout = _place(block, files, get, layer, prefix)
        check_layout(layout)
        return jax.tree.map(
            lambda tensor: read(tensor, lambda key: _array(get(start + key))), layout
        )


def save(
    folder: Folder, layer: int, params: Params, *, prefix: str | None = None, config: Any = None
) -> None:
    """Writes the params of one block into a checkpoint, replacing the ones that are there.

    The other tensors stay as they are, and each file is replaced only once its new version is
    complete. It needs memory for the params and one of the files. To keep the old checkpoint, copy
    its folder first.

    Args:
        folder: a folder with a ``config.json`` and safetensors files, with an index if several.
        layer: which layer of the model, from 0.
        params: a pytree with the structure and shapes of the layer of ``block(folder)``. Tensors
            keep the names that they have in the folder, and get the dtypes of params.
        prefix: as for `load`.
        config: as for `load`.

    Raises:
        ValueError: as for `load`, or if the params do not fit.
        ImportError: without safetensors; names the command that installs it.

    Example:
        >>> save(folder, 3, params)  # doctest: +SKIP
    """
    block = _block(folder if config is None else config)
    with _opened(folder) as (files, get):
        start, layout = _place(block, files, get, layer, prefix)
    state = {start + key: array for key, array in to_torch(layout, params).items()}
    with written_whole(sorted({files[name] for name in state})) as partial:
        for file, copy in partial.items():
            _write_copy(file, copy, state)


def _block(config: Any) -> Block:
    config = as_dict(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        refuse(config, "quantization_config", "be absent: dequantise the weights first", method)
    return build(config)


@contextmanager
def _opened(folder: Folder) -> Iterator[tuple[Files, Callable[[str], Any]]]:
    """Which file holds each tensor, and a function that opens one without reading it."""
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in _files(local(folder))}
        files = {name: file for file, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
        yield files, lambda name: handles[files[name]].get_slice(name)


def _open(file: Path) -> Any:
    try:
        return library().safe_open(file, framework="numpy")
    except library().SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not places:
            raise ValueError(f"{index} must have a `weight_map`, got none.")
        names = sorted(set(places.values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{folder} must hold the files of a checkpoint, missing {missing}.")
    return files


def _place(
    block: Block, files: Files, get: Callable[[str], Any], layer: int, prefix: str | None
) -> tuple[str, Layout]:
    """Where the block is in the files: what its names begin with, and which layout it has."""
    found = [
        (start, layout)
        for layout in (block.published, block.layout)
        for start in _starts(layout, files, layer, prefix)
        if _has(layout, start, files, get)
    ]
    starts = sorted({start for start, _ in found})
    if not found:
        _refuse_shapes(block, files, get, layer, prefix)
        wanted = [jax.tree.leaves(one)[0].key for one in (block.published, block.layout)]
        raise ValueError(
            f"Layer {layer} must hold a block of this model, with tensors such as "
            f"{' or '.join(wanted)}, got {sorted(files)[:8]} and {max(0, len(files) - 8)} more: a "
            "dense layer has none; give the `prefix` if it is elsewhere."
        )
    if len(starts) > 1:
        raise ValueError(f"Layer {layer} must hold one block, got {starts}: give its `prefix`.")
    _refuse_others(*found[0], files)
    return found[0]


def _starts(layout: Layout, files: Files, layer: int, prefix: str | None) -> set[str]:
    if prefix is not None:
        return {prefix.rstrip(".") + "." if prefix else ""}
    [_, first], *_ = jax.tree.leaves(layout)[0].parts()
    in_layer = re.compile(rf"(?:^|\.)(?:layers|blocks|block|h)\.{layer}\.")
    ends = {name.removesuffix(first) for name in files if name.endswith(f".{first}")}
    return {start for start in ends if in_layer.search(start)}


def _has(layout: Layout, start: str, files: Files, get: Callable[[str], Any]) -> bool:
    """Whether the files hold all tensors of a layout, in its shapes."""
    return all(
        name in files and tuple(get(name).get_shape()) == shape
        for name, shape in _tensors(layout, start)
    )


def _tensors(layout: Layout, start: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a layout's tensors in the files."""
    for tensor in jax.tree.leaves(layout):
        for _, key in tensor.parts():
            yield start + key, tuple(tensor.stored or tensor.shape)


def _refuse_shapes(
    block: Block, files: Files, get: Callable[[str], Any], layer: int, prefix: str | None
) -> None:
    """Refuses a tensor of the block that is there in another shape."""
    for layout in (block.published, block.layout):
        for start in sorted(_starts(layout, files, layer, prefix)):
            for name, shape in _tensors(layout, start):
                if name in files and (stored := tuple(get(name).get_shape())) != shape:
                    raise ValueError(
                        f"`{name}` must have the shape that follows from the configuration, "
                        f"{list(shape)}, got {list(stored)}: give the `config` of these files."
                    )


def _refuse_others(start: str, layout: Layout, files: Files) -> None:
    """Refuses tensors of the block's module that the layout leaves out.

    Where the block begins at a whole layer, as Granite's does, only its own modules count: the
    others are attention and norms.
    """
    known = {name for name, _ in _tensors(layout, start)}
    modules = {start}
    if re.search(r"\.\d+\.$", start):
        modules = {f"{start}{name.removeprefix(start).split('.')[0]}." for name in known}
    others = sorted(name for name in files if name not in known and name.startswith(tuple(modules)))
    if others:
        raise ValueError(
            "The block must hold only tensors that follow from the configuration, got "
            f"{others[:4]} and {max(0, len(others) - 4)} more: give the `config` of these files."
        )


def _array(piece: Any) -> np.ndarray:
    return piece[:] if piece.get_shape() else np.asarray(piece[...])


def _write_copy(file: Path, copy: Path, state: Mapping[str, np.ndarray]) -> None:
    """Copies a file with new values for the tensors in ``state``."""
    with _open(file) as handle:
        arrays = {
            name: state[name] if name in state else handle.get_tensor(name)
            for name in handle.keys()  # noqa: SIM118
        }
        metadata = handle.metadata()
    library().numpy.save_file(arrays, copy, metadata=metadata)
