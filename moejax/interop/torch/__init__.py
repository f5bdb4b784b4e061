"""Parameters to and from PyTorch ``state_dict``s, in NumPy, without PyTorch.

A layout says where in a ``state_dict`` each parameter lies: it is a pytree with the structure of
the params and a `Tensor` at every leaf. Layouts compose as the layers do. `to_torch` and
`from_torch` convert params by a layout; the round trip is exact.

Example:
    >>> from moejax import conversion
    >>> model = moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, 2), num_experts=2)
    >>> layout = conversion.moe(conversion.linear(2, 1), conversion.mlp(2, 4, 2), num_experts=2)
    >>> state_dict = conversion.to_torch(layout, model.init(jax.random.key(0)))
    >>> for name, tensor in sorted(state_dict.items()):
    ...     print(name, tensor.shape)
    experts.0.bias (1,)
    experts.0.weight (1, 2)
    experts.1.bias (1,)
    experts.1.weight (1, 2)
    gate.0.bias (4,)
    gate.0.weight (4, 2)
    gate.2.bias (2,)
    gate.2.weight (2, 4)
    >>> params = conversion.from_torch(layout, state_dict)
    >>> params["experts"]["kernel"].shape
    (2, 2, 1)
"""

from moejax.interop.torch.layouts import (
    Layout,
    Part,
    Tensor,
    at,
    glu,
    linear,
    mlp,
    moe,
    parts,
    stack,
    stacked,
)
from moejax.interop.torch.state_dicts import StateDict, from_torch, to_torch
from moejax.interop.torch.tensors import as_tensors

__all__ = [
    "Layout",
    "Part",
    "StateDict",
    "Tensor",
    "as_tensors",
    "at",
    "from_torch",
    "glu",
    "linear",
    "mlp",
    "moe",
    "parts",
    "stack",
    "stacked",
    "to_torch",
]
