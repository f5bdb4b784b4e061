"""The batched pass: every expert on its slots, a few experts at a time.

On CPU the experts go in chunks, so that what lies between an expert's products stays in the
processor's cache, and memory is taken for one chunk only. The backward pass computes the outputs
of a chunk again: reading what the forward pass had written took as long where experts have some
hundred tokens each, and needed twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from moejax.blocks import Operands, Tree, differentiable, merge
from moejax.dispatch import Slots, collect, gates_of_slots, sum_over_features
from moejax.types import Array, Params

Apply = Callable[[Params, Array, list[Array]], Array]  # (params, x, what it closes over) -> y

ROWS = 1280  # of a chunk at most: with half or twice as many it took up to a sixth longer.


def outputs_of_slots(apply: Apply, slots: Slots, operands: Operands) -> Array:
    """What every expert makes of its slots, ``[T, ...] -> [E, C, ...]``.

    Args:
        apply: the expert, for one expert's parameters and C rows.
        slots: who stands where; an empty slot may give anything.
        operands: parameters, tokens, gates of the choices, and what the expert closes over.
    """
    x = operands.tokens

    def one(params: Params, choice: Array) -> Array:
        return apply(params, x[choice % len(x)], operands.shared)

    return _by_chunks(one, slots, (operands.params, slots.choice))


def cotangents(
    apply: Apply, slots: Slots, operands: Operands, outputs: Array, cotangent: Array
) -> Operands:
    """The cotangents of the operands, given that of the gated sum over the slots.

    Args:
        apply: as for `outputs_of_slots`.
        slots: as for `outputs_of_slots`.
        operands: as for `outputs_of_slots`.
        outputs: from `outputs_of_slots`, shape [E, C, ...].
        cotangent: of the sum, shape [T, ...].

    Returns:
        The cotangents, None in the place of operands that have none.
    """
    x, weights = operands.tokens, operands.choices

    def one(params: Params, choice: Array, gates: Array) -> Operands:
        given = Operands(params, x[choice % len(x)], shared=operands.shared)
        to_outputs = gates.reshape(gates.shape + (1,) * (cotangent.ndim - 1))
        to_outputs *= cotangent[choice % len(x)]

        def outputs_of(some: Operands) -> Array:
            params, x, _, shared = merge(some, given)
            return apply(params, x, shared)

        _, pullback = jax.vjp(outputs_of, differentiable(given))
        return pullback(to_outputs.astype(outputs.dtype))[0]

    by_expert = operands.params, slots.choice, gates_of_slots(weights, slots)
    params, tokens, _, shared = _by_chunks(one, slots, by_expert)
    return Operands(
        params,
        jax.tree.map(lambda rows: collect(rows, slots), tokens),
        sum_over_features(cotangent, outputs, slots).reshape(weights.shape),
        jax.tree.map(lambda each: each.sum(axis=0), shared),
    )


def _by_chunks(one: Callable[..., Tree], slots: Slots, args: Tree) -> Tree:
    """``one`` for every expert, leaves ``[E, ...]``."""
    at_once = lambda args: jax.vmap(one)(*args)  # noqa: E731
    size = _chunk(*slots.choice.shape)
    if size == len(slots.choice):
        return at_once(args)
    chunked = partial(jax.lax.map, lambda args: one(*args), batch_size=size)
    return jax.lax.platform_dependent(args, cpu=chunked, default=at_once)


def _chunk(num_experts: int, capacity: int) -> int:
    """Experts per chunk: all of them if they have few rows, else a number that divides theirs.

    Not one: XLA runs the product of one expert alone another way, half as fast. Not more than 8:
    a chunk copies its experts' parameters, and those of 32 took 37 ms where those of 8 took 22. A
    last chunk of another size would make every result be copied, for half the time again.
    """
    if num_experts * capacity <= ROWS:
        return num_experts
    sizes = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
    fitting = [n for n in sizes if n <= 8 and n * capacity <= ROWS]
    return max(fitting, default=min(sizes, default=1))
