"""Every refusal: bad input gets one clear line that says what must hold and what was got."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from moejax._arrays import at_least_float32
from moejax.base import Array, ExpertChoice, Params, Routing, SoftSlots

SCHEDULES = MappingProxyType(
    {
        Routing: "`dense`, `dropless` or `capacity`",
        ExpertChoice: "`gather_slots`",
        SoftSlots: "`mix_slots`",
    }
)


DECISIONS = tuple(SCHEDULES)
AXES = MappingProxyType({Routing: "[T, E]", ExpertChoice: "[T, E]", SoftSlots: "[T, E, C]"})
Function = TypeVar("Function", bound=Callable[..., Any])


def takes(*kinds: type) -> Callable[[Function], Function]:
    """Refuses decisions of other kinds, and stacks of decisions, before wrong numbers come out.

    A decision of the caller's own type is let through: it may have the fields that are read.
    """
    expected = " or ".join(kind.__name__ for kind in kinds)

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, DECISIONS) and not isinstance(value, kinds):
                    raise ValueError(
                        f"`{function.__name__}` takes a decision of type {expected}, got "
                        f"{type(value).__name__}, which goes with {_of(value, SCHEDULES)}."
                    )
                if isinstance(value, DECISIONS):
                    _check_axes(function.__name__, value)
            return function(*args, **kwargs)

        return cast(Function, checked)

    return decorate


def _check_axes(function: str, decision: Any) -> None:
    """Refuses a stack of decisions, over which a mean would pool what a loss must keep apart."""
    axes, shape = _of(decision, AXES), jnp.shape(decision.logits)
    if len(shape) != axes.count(",") + 1:
        raise ValueError(
            f"`{function}` takes one decision, whose logits are {axes}, got logits of shape "
            f"{list(shape)}: for a stack of decisions use jax.vmap({function})."
        )


def _of(decision: Any, table: Mapping[type, str]) -> str:
    return next(text for kind, text in table.items() if isinstance(decision, kind))


def is_integer(value: Any) -> bool:
    """Whether a value from the caller is an integer of Python or NumPy, and not an array."""
    return isinstance(value, numbers.Integral)


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy, not an array, which may be traced."""
    return isinstance(value, numbers.Real)


def positive_like(name: str, value: Array | float, of: str, array: Array) -> Array:
    """The value in the dtype and rank of an array to which it broadcasts, or a scalar.

    A number must be positive; an array is not checked, because it may be traced.
    """
    converted = jnp.asarray(value).astype(array.dtype)
    sizes = zip(converted.shape[::-1], array.shape[::-1], strict=False)
    fits = converted.ndim <= array.ndim and all(size in (1, whole) for size, whole in sizes)
    if not fits or (is_number(value) and not value > 0):
        raise ValueError(
            f"`{name}` must be positive and broadcast to the {of} {list(array.shape)}, got "
            f"{value if is_number(value) else list(converted.shape)}."
        )
    missing = range(array.ndim - converted.ndim) if converted.ndim else ()
    return jnp.expand_dims(converted, tuple(missing))


def check_mask(mask: Array, shape: tuple[int, ...]) -> None:
    """Refuses a mask of another shape, which would broadcast, and one that is not boolean."""
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"`mask` must be a boolean array of shape {list(shape)}, True for tokens that count, "
            f"got {mask.dtype}{list(mask.shape)}."
        )


def check_count(name: str, count: int) -> None:
    """Refuses a count that is not a positive integer."""
    if not (is_integer(count) and count >= 1):
        raise ValueError(f"`{name}` must be an integer, at least 1, got {count!r}.")


def check_num_choices(count: int) -> None:
    """Refuses more choices than int32 can number. A symbolic count is a promise to stay below."""
    if isinstance(count, int) and count >= 2**31:
        raise ValueError(
            f"At most 2^31 - 1 choices (tokens times experts per token) can be put in order at "
            f"once, got {count}: split the tokens, as with `jax.lax.map`."
        )


def check_stacked(params: Params, num_experts: int) -> None:
    """Refuses parameters of another number of experts: an index beyond them reads the last one."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.shape[:1] != (num_experts,):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                "Every leaf of the experts' params must have a leading axis of `num_experts` "
                f"({num_experts}), got {name} {list(leaf.shape)}."
            )


def check_widths(name: str, *widths: int) -> None:
    """Refuses widths that are not positive integers."""
    if not all(is_integer(width) and width > 0 for width in widths):
        raise ValueError(f"The widths of `{name}` must be positive integers, got {widths}.")


def check_input(x: Array, kernel: Array) -> None:
    d_in, d_out = kernel.shape[-2:]
    if x.shape[-1:] != (d_in,):
        raise ValueError(
            f"`linear({d_in}, {d_out})` takes inputs of width {d_in}, got {list(x.shape)}."
        )
    # The kernel is cast to the dtype of x; cast to integers, it would become zeros.
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"`linear` takes floats, got {x.dtype}: cast with x.astype(jnp.float32).")


def check_gate(gate: Array, y: Array) -> None:
    """Refuses a gate that would broadcast the output to another shape."""
    if gate.shape[:-1] != y.shape[:-1] or gate.shape[-1] not in (1, y.shape[-1]):
        raise ValueError(
            f"The gate of `gated` must return one number per token, [..., 1], or per output, "
            f"{list(y.shape)}, got {list(gate.shape)}: use linear(D, 1)."
        )


def checked_logits(logits: Array) -> Array:
    """The logits in float32 or wider, once their shape and dtype are known to be right."""
    if logits.ndim != 2 or logits.shape[-1] < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            "`logits` must be a float array of shape [tokens, experts], got "
            f"{logits.dtype}{list(logits.shape)}: flatten other axes into tokens."
        )
    return at_least_float32(logits)


def check_k(k: int, logits: Array) -> None:
    """Refuses a number of choices that the logits cannot offer."""
    num_experts = logits.shape[-1]
    if not (is_integer(k) and 1 <= k <= num_experts):
        raise ValueError(
            f"`k` must be an integer between 1 and the number of experts ({num_experts}), "
            f"got {k!r}."
        )


def check_several(rule: str, logits: Array) -> None:
    """Refuses logits of one expert, where a rule is to choose two."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"`{rule}` sends a token to two experts: its logits must be [tokens, experts] of at "
            f"least two, got {list(logits.shape)}."
        )


def check_problem(params: Params, x: Array, shape: tuple[int, ...]) -> tuple[Params, Array]:
    """Refuses params or tokens that do not fit a decision: too large an index reads the last one.

    Returns:
        The parameters and tokens as JAX's arrays: NumPy's cannot be indexed by traced choices.
    """
    num_tokens, num_experts = shape
    params, x = jax.tree.map(jnp.asarray, (params, x))
    check_stacked(params, num_experts)
    if x.shape[0] != num_tokens:
        raise ValueError(
            f"`x` must hold the {num_tokens} tokens that were routed, got {x.shape[0]}."
        )
    return params, x


def check_array(output: Any) -> None:
    """Refuses an expert that returns something besides its output, as a layer of `moe` does."""
    if not hasattr(output, "shape"):
        raise ValueError(
            f"An expert must return one array, got a {type(output).__name__}: wrap a mixture in "
            "`outputs_of`."
        )


def check_outputs(shape: tuple[int, ...], num_tokens: int) -> None:
    """Refuses an expert that sums over tokens or leaves some out."""
    if shape[:1] != (num_tokens,):
        raise ValueError(
            f"An expert must return one output per token, [{num_tokens}, ...], got {list(shape)}: "
            "its x is [tokens, ...]."
        )


def check_gates(gates: Array, params: Params, num_tokens: int) -> None:
    # One gate for all experts would broadcast; params may be empty, and then have no axis E.
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(gates.shape) != 2 or gates.shape[0] != num_tokens or leading - {gates.shape[1:]}:
        raise ValueError(
            f"`gates` must be [T, E] for {num_tokens} tokens and E the leading axis of every leaf "
            f"of the params, got {list(gates.shape)} and leaves {[[*axis] for axis in leading]}."
        )


def check_layer(name: str, layer: Any) -> None:
    """Refuses what is not a layer, and says how to make one of it."""
    of_flax = any(cls.__module__.startswith("flax.") for cls in type(layer).__mro__)
    if not of_flax and all(callable(getattr(layer, part, None)) for part in ("init", "apply")):
        return
    if of_flax:
        advice = "moejax.adapters.from_linen(module), or from_nnx for an NNX module, makes one"
    elif isinstance(layer, tuple) and len(layer) == 2:
        advice = "write moejax.Layer(init, apply)"
    else:
        advice = "moejax.Layer(init, apply) makes one of two functions"
    raise ValueError(
        f"`{name}` must be a Layer, a pair of functions init(key) and apply(params, x), got a "
        f"{'function' if callable(layer) and not of_flax else type(layer).__name__}: {advice}."
    )


def check_key(key: Any) -> None:
    """Refuses what is not a PRNG key, such as a seed."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    old = dtype == jnp.uint32 and key.ndim == 1
    if not (old or (typed and key.ndim == 0)):
        got = key if is_number(key) else f"a {type(key).__name__}"
        raise ValueError(
            f"`init` takes a PRNG key, such as jax.random.key(0), which it splits; got {got}."
        )


def check_expert_params(params: Params, num_experts: int) -> None:
    """Refuses parameters of another number of experts, before the router is blamed for them."""
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(counts) == 1 and (count := counts.pop()) and count[0] != num_experts:
        raise ValueError(
            f"The parameters must be of as many experts as the model's `num_experts` "
            f"({num_experts}), got parameters of {count[0]} experts: initialise them with this "
            "model, or build it with as many."
        )


def check_present(missing: set[tuple[str, ...]]) -> None:
    """Refuses variables of a Linen module that lack some of its layer's params."""
    if missing:
        raise ValueError(
            "The variables must hold every parameter of the layer, but lack "
            f"{sorted('/'.join(place) for place in missing)}: pass all that `init` returned."
        )
