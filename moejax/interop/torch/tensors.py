"""NumPy's arrays as tensors of PyTorch, which is imported when this is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def tensors(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `to_torch` returns as tensors, for ``module.load_state_dict``.

    Args:
        state_dict: arrays by name, bfloat16 too, which ``torch.from_numpy`` does not take.

    Returns:
        Tensors by name, of the same dtypes, on the CPU. They share the arrays' memory.

    Raises:
        ImportError: without PyTorch; names the command that installs it.

    Example:
        >>> from moejax import conversion
        >>> layout = conversion.linear(3, 2)
        >>> state_dict = conversion.to_torch(layout, moejax.linear(3, 2).init(jax.random.key(0)))
        >>> tensors(state_dict)["weight"].shape  # doctest: +SKIP
        torch.Size([2, 3])
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("Tensors need PyTorch: pip install 'moejax[torch]'.") from error

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: tensor(array) for name, array in state_dict.items()}
