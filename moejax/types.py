"""The vocabulary that every other module speaks.

The letters are the same in names, docstrings, comments and einsums:
T tokens, E experts, K experts per token, C slots per expert, D input width, F hidden width,
O output width.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Any  # a pytree of arrays
Expert = Callable[..., Array]  # (params, x [T, ...]) -> [T, ...]
Matmul = Callable[[Array, Array], Array]  # (x [T, D], kernel [D, O]) -> [T, O]


class Layer(NamedTuple):
    """A pair of pure functions: whatever owns parameters is one.

    Attributes:
        init: ``key -> params``, where params is a pytree of arrays.
        apply: ``(params, x, ...) -> y``.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Any]


class Routing(NamedTuple):
    """A token-choice decision, with the evidence that losses and plots read.

    An expert id of E means "nowhere": every choice of a masked token has it. Such a choice has
    weight zero, runs in no expert, takes no capacity and enters no loss.

    Attributes:
        experts: chosen experts, integers in [0, E], shape [T, K].
        weights: their gates, at least float32, shape [T, K].
        scores: probabilities (or normalised scores) over all experts, shape [T, E].
        logits: the router's output before any noise, shape [T, E].
        chances: how likely each expert would be chosen if the noise were drawn again, shape
            [T, E]; None for a rule without noise.
    """

    experts: Array
    weights: Array
    scores: Array
    logits: Array
    chances: Array | None = None

    @property
    def num_experts(self) -> int:
        """E, read from the shape of the scores."""
        return self.scores.shape[-1]

    @property
    def chosen(self) -> Array:
        """Which choices go to an expert at all, shape [T, K]."""
        return self.experts < self.num_experts

    @property
    def counts(self) -> Array:
        """How many choices go to each expert, int32 [E]."""
        return by_expert(self, jnp.ones_like(self.experts, jnp.int32)).sum(axis=0)

    @property
    def present(self) -> Array:
        """Which tokens are no padding: those that go to an expert at all, shape [T]."""
        return self.chosen.any(axis=-1)


class ExpertChoice(NamedTuple):
    """A decision in which every expert takes C tokens; its schedule is `gather_slots`.

    Attributes:
        tokens: chosen tokens, integers in [0, T], where T is an empty slot, shape [E, C].
        weights: their gates, zero in an empty slot, shape [E, C].
        scores: probabilities over experts, zero for a masked token, shape [T, E].
        logits: the router's output, shape [T, E].
    """

    tokens: Array
    weights: Array
    scores: Array
    logits: Array

    @property
    def present(self) -> Array:
        """Which tokens are no padding, shape [T]."""
        return self.scores.any(axis=-1)


class SoftSlots(NamedTuple):
    """A decision in which every slot takes a mean of all tokens; its schedule is `mix_slots`.

    Attributes:
        dispatch: share of a token in a slot, sums to one over tokens, shape [T, E, C].
        combine: share of a slot in a token's output, sums to one over slots, shape [T, E, C].
        logits: the router's output, shape [T, E, C].
    """

    dispatch: Array
    combine: Array
    logits: Array

    @property
    def present(self) -> Array:
        """Which tokens are no padding, shape [T]."""
        return self.combine.any(axis=(1, 2))


SCHEDULES = MappingProxyType(
    {
        Routing: "`dense`, `dropless` or `capacity`",
        ExpertChoice: "`gather_slots`",
        SoftSlots: "`mix_slots`",
    }
)
Function = TypeVar("Function", bound=Callable)


def takes(*kinds: type) -> Callable[[Function], Function]:
    """Refuses decisions of other kinds by name, before a missing attribute or wrong numbers do.

    A decision of the caller's own type is let through: it may have what the function reads.
    """
    expected = " or ".join(kind.__name__ for kind in kinds)

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if type(value) in SCHEDULES and type(value) not in kinds:
                    raise ValueError(
                        f"`{function.__name__}` takes a decision of type {expected}, got "
                        f"{type(value).__name__}, which goes with {SCHEDULES[type(value)]}."
                    )
            return function(*args, **kwargs)

        return cast(Function, checked)

    return decorate


def by_expert(routing: Routing, values: Array) -> Array:
    """Values of choices laid out by expert, [T, K] -> [T, E]; zero where none was made."""
    num_experts = routing.num_experts
    if values.shape[1] * num_experts <= 64:
        # A few comparisons are fused with what is around them, where a scatter is not: a step of
        # the toy mixture takes 33 instead of 39 microseconds.
        ids = jnp.arange(num_experts, dtype=routing.experts.dtype)
        choices = zip(routing.experts.T, values.T, strict=True)
        return reduce(jnp.add, [jnp.where(e[:, None] == ids, v[:, None], 0) for e, v in choices])

    def of_token(experts: Array, values: Array) -> Array:
        # As an index, a negative id would count from the end; above it is nowhere.
        experts = jnp.where(experts < 0, num_experts, experts)
        return jnp.zeros(num_experts, values.dtype).at[experts].add(values, mode="drop")

    # Token by token, so that tokens spread over a mesh stay where they are.
    return jax.vmap(of_token)(routing.experts, values)


def accepts(function: Callable, name: str) -> bool:
    """Whether ``function`` names this keyword argument (``partial`` and ``wraps`` included).

    A bare ``**kwargs`` does not count: what it is forwarded to may not know the keyword.
    """
    return name in inspect.signature(function).parameters


def is_integer(value: Any) -> bool:
    """Whether a number that the caller gives is an integer: Python's or NumPy's, no array."""
    return isinstance(value, numbers.Integral)


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy, and no array, which may be traced."""
    return isinstance(value, numbers.Real)


def positive_like(name: str, value: Array | float, of: str, array: Array) -> Array:
    """The value in the dtype of an array to which it broadcasts; a number must be positive."""
    converted = jnp.asarray(value).astype(array.dtype)
    sizes = zip(converted.shape[::-1], array.shape[::-1], strict=False)
    fits = converted.ndim <= array.ndim and all(size in (1, whole) for size, whole in sizes)
    if not fits or (is_number(value) and not value > 0):
        raise ValueError(
            f"`{name}` must be positive and broadcast to the {of} {list(array.shape)}, got "
            f"{value if is_number(value) else list(converted.shape)}."
        )
    return converted


def check_mask(mask: Array, shape: tuple[int, ...]) -> None:
    """Refuses a mask that would broadcast, or whose numbers could mean anything."""
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"`mask` must be a boolean array of shape {list(shape)}, True for tokens that count, "
            f"got {mask.dtype}{list(mask.shape)}."
        )


def at_least_float32(x: Array) -> Array:
    """Promotes bfloat16 and float16 to float32; float64 stays float64."""
    # NumPy's promotion, because JAX's own refuses to mix dtypes in its strict mode.
    return x.astype(np.promote_types(x.dtype, np.float32))
