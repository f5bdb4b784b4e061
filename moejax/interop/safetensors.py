"""Weights on disk: safetensors with a checksum, never pickle.

The format has no checksum of its own, and most flipped bits load as other numbers; so a SHA-256 of
the content goes into its metadata. The files open in any safetensors reader, PyTorch's too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import numpy as np

from moejax._files import written_whole
from moejax._paths import local

CHECKSUM = "sha256"
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("bool", *INTEGERS, "float16", "float32", "float64", "bfloat16")


def save(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes named arrays, such as `moejax.interop.torch.to_torch` makes, to one safetensors file.

    Args:
        path: where to write; an existing file is replaced only once the new one is complete.
        arrays: by name; booleans, integers, or floats of 16 to 64 bits.

    Raises:
        ValueError: if the path is not one on this machine, if a name is not a string, or an array
            has a dtype that `load` cannot read; names them. Then nothing is written.
        ImportError: without safetensors; names the command that installs it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/weights.safetensors", {"weight": np.ones((2, 3))})
        ...     load(f"{folder}/weights.safetensors")["weight"].shape
        (2, 3)
    """
    # safetensors writes the buffer of a transposed array as it lies in memory: make it C order.
    contiguous = {name: _native(np.array(array, order="C")) for name, array in arrays.items()}
    _check(contiguous)
    metadata = {CHECKSUM: _digest(contiguous)}
    path = local(path)
    with written_whole([path]) as partial:
        partial[path].write_bytes(library().numpy.save(contiguous, metadata=metadata))


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the arrays that `save` wrote, and checks that they are unchanged.

    Args:
        path: a file that `save` wrote. One from elsewhere has no checksum; read it with
            ``safetensors.numpy.load_file``.

    Returns:
        Arrays by name.

    Raises:
        ValueError: if the path is not one on this machine, or if the file is damaged or has no
            checksum; names it.
        ImportError: without safetensors; names the command that installs it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/weights.safetensors", {"bias": np.zeros(2, "f4")})
        ...     load(f"{folder}/weights.safetensors")
        {'bias': array([0., 0.], dtype=float32)}
    """
    content = local(path).read_bytes()
    with _refusing_damage(path):
        tensors = library().deserialize(content)
        expected = _metadata(content).get(CHECKSUM)
    if expected is None:  # then it may hold dtypes that `save` does not write
        raise ValueError(
            f"{path} has no checksum, so it was not written by `save`: if you trust it, read it "
            "with safetensors.numpy.load_file."
        )
    with _refusing_damage(path):
        arrays = {name: _array(**tensor) for name, tensor in tensors}
    if expected != _digest(arrays):
        raise ValueError(f"{path} is damaged: its content does not have its checksum.")
    return arrays


@contextmanager
def _refusing_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (library().SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, it cannot be read: {error}.") from error


def _native(array: np.ndarray) -> np.ndarray:
    # The checksum is of bytes, and what is read back is in the byte order of the machine.
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    unnamed = [name for name in arrays if not isinstance(name, str) or name == "__metadata__"]
    if unnamed:
        raise ValueError(
            f'The names of arrays must be strings, and not "__metadata__", got {unnamed}: make a '
            "flat dict of the arrays."
        )
    unknown = {name: a.dtype.name for name, a in arrays.items() if a.dtype.name not in DTYPES}
    if unknown:
        raise ValueError(
            f"The dtypes of arrays must be of {', '.join(DTYPES)}, got {unknown}: cast the arrays, "
            "and flatten nested dicts."
        )


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    # Not safetensors.numpy.load: it writes bfloat16 but does not read it. "BF16" is bfloat16.
    kinds = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}
    kind = dtype.rstrip("0123456789")
    name = kinds.get(kind, kind) + dtype[len(kind) :]
    return np.frombuffer(bytearray(data), jax.numpy.dtype(name)).reshape(shape)


def _metadata(content: bytes) -> dict[str, str]:
    # Eight bytes of length, then a JSON header: `deserialize` leaves the metadata out.
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def library() -> ModuleType:
    """The safetensors library, imported when it is needed."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Weights are saved with safetensors: pip install 'moejax[torch]' or pip install "
            "safetensors."
        ) from error
    return safetensors
