"""PyTorch tensors and NumPy arrays, even of the dtypes that NumPy lacks: bfloat16, float8.

NumPy holds those as the types of ``ml_dtypes``, which PyTorch does not know; so where one side's
own conversion fails, the bits travel as integers of the same width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def as_tensors(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A ``state_dict`` of NumPy arrays as one of PyTorch tensors, of the same dtypes.

    Args:
        state_dict: arrays by name, as from `to_torch`.

    Returns:
        Tensors by name, which share the memory of the arrays where they can.

    Raises:
        ImportError: without PyTorch; names the command that installs it.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2, bias=False)
        >>> state_dict = conversion.to_torch(layout, {"kernel": jnp.ones((3, 2), jnp.bfloat16)})
        >>> conversion.as_tensors(state_dict)["weight"].dtype  # doctest: +SKIP
        torch.bfloat16
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError("Tensors need PyTorch: pip install 'moejax[torch]'.") from error
    return {name: _tensor(np.asarray(array)) for name, array in state_dict.items()}


def as_array(name: str, tensor: Any) -> np.ndarray:
    """A PyTorch tensor, or any array, as a NumPy array; an error names the tensor."""
    try:
        return _array(tensor)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be readable as a NumPy array, got: {error}") from error


def _tensor(array: np.ndarray) -> Any:
    import torch

    registered_by_ml_dtypes = array.dtype.isbuiltin == 2
    if not registered_by_ml_dtypes:
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(f"u{array.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name))


def _array(tensor: Any) -> np.ndarray:
    name = str(tensor.dtype) if hasattr(tensor, "detach") else ""
    if name != "torch.bfloat16" and not name.startswith("torch.float8"):
        return np.asarray(tensor.detach() if name else tensor)
    import torch

    integers = torch.uint8 if tensor.itemsize == 1 else torch.int16
    bits = tensor.detach().contiguous().view(integers).numpy()
    return bits.view(name.removeprefix("torch."))
