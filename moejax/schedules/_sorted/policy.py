"""Every decision that depends on sizes or on the platform, in one place.

A policy says how the engine computes a gated sum; it never changes the sum.

On CPU a batched pass gives every expert about the mean load, a few experts at a time, so that the
values between their products stay in the processor's cache. Loops over blocks of one expert each
take the remaining choices. On accelerators, loops wait for the host and padding is wasted work, so
experts that take ``matmul`` run through one grouped product over the sorted rows, without either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax._calling import accepts
from moejax._checks import is_integer
from moejax.base import Array, Expert, Matmul
from moejax.schedules._sorted.products import transposing_matmul

# Up to this many rows in all, the experts are computed at once: reading their parameters then takes
# longer than the products, and chunks would copy them. Also the most rows of a chunk.
CACHED_ROWS = 1280
MANY_EXPERTS = 16  # from here on the loads of random routing differ enough to group experts by load


class Group(NamedTuple):
    """Experts with equally many slots each.

    Attributes:
        size: number of experts.
        capacity: slots per expert, C.
    """

    size: int
    capacity: int


class Policy(NamedTuple):
    """How the engine computes a gated sum over sorted choices; known while tracing.

    Attributes:
        groups: slots of the experts in the batched pass, experts with the most choices first; a
            single group keeps the experts in their own order.
        blocks: rows per block of each loop over what the batched pass left; without loops, those
            choices are dropped.
        chunked: whether the batched pass computes a few experts at a time.
        matmul: the matrix product that experts are given, if they take one.
        grouped: whether experts run once on all rows sorted by expert, with a grouped product;
            slots, chunks and blocks then play no part.
    """

    groups: tuple[Group, ...]
    blocks: tuple[int, ...]
    chunked: bool
    matmul: Matmul
    grouped: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(group.size for group in self.groups)

    @property
    def num_slots(self) -> int:
        """Slots of all experts together, S."""
        return _num_slots(self.groups)


def policy_for_dropless(
    expert: Expert, num_tokens: int, num_experts: int, k: int, *, platform: str | None = None
) -> Policy:
    """The policy under which every choice is computed.

    Args:
        expert: the expert; on accelerators it matters whether it takes ``matmul``.
        num_tokens: T.
        num_experts: E.
        k: choices per token, K.
        platform: such as ``"cpu"``; by default the platform of JAX's default backend.

    Returns:
        The policy.
    """
    cpu = on_cpu(platform)
    if not cpu and accepts(expert, "matmul"):
        return Policy((Group(num_experts, 0),), (), False, jnp.matmul, grouped=True)
    groups, blocks = _slots_and_blocks(num_tokens, num_experts, k, by_load=cpu)
    return _policy(groups, blocks, cpu)


def policy_for_capacity(num_experts: int, capacity: int, *, platform: str | None = None) -> Policy:
    """The policy that gives each of E experts C slots, and drops the choices beyond them."""
    return _policy((Group(num_experts, capacity),), (), on_cpu(platform))


def worth_batching(filled: Array, num_choices: int) -> Array:
    """Whether the batched pass holds at least half of the choices; otherwise loops take them all.

    Collapsed routing and padding leave most slots empty, and an empty slot costs as much as a
    filled one.
    """
    return 2 * jnp.sum(filled) >= num_choices


def always_batched(policy: Policy) -> bool:
    """Whether the batched pass always runs: without loops, or where a condition costs more.

    With no condition between the two passes, XLA merges what the backward pass recomputes with the
    forward pass.
    """
    return not policy.blocks or policy.num_slots <= CACHED_ROWS


def experts_per_chunk(num_experts: int, capacity: int) -> int:
    """How many of E experts with C slots each a chunk computes: at most four, and a divisor of E.

    Larger chunks mean fewer trips of the loop. But a chunk copies its experts' parameters, and the
    values between their products must stay in the processor's cache. A last chunk of another size
    would make XLA copy every result.
    """
    fitting = [n for n in (2, 3, 4) if num_experts % n == 0 and 2 * n * capacity <= CACHED_ROWS]
    return max(fitting, default=1)


def on_cpu(platform: str | None = None) -> bool:
    """Whether a platform is a CPU; by default the platform of JAX's default backend."""
    return (platform or jax.default_backend()) == "cpu"


def _policy(groups: tuple[Group, ...], blocks: tuple[int, ...], cpu: bool) -> Policy:
    chunked = cpu and (_num_slots(groups) > CACHED_ROWS or len(groups) > 1)
    return Policy(groups, blocks, chunked, transposing_matmul if cpu else jnp.matmul)


def _num_slots(groups: tuple[Group, ...]) -> int:
    return sum(size * capacity for size, capacity in groups)


def _slots_and_blocks(
    num_tokens: int, num_experts: int, k: int, *, by_load: bool
) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """About the mean load in the batched pass, and loops over blocks of what it leaves.

    There is no batched pass for fewer choices than experts, because it would read every expert, nor
    where tokens may choose every expert: such a rule, `relu`, leaves most of its choices out, and
    only loops cost no more than the choices that are made.
    """
    if not is_integer(num_tokens):  # symbolic, while exporting: sizes cannot depend on it
        return (Group(num_experts, 0),), (512, 32)
    num_choices = num_tokens * k
    mean = -(-num_choices // num_experts)
    if num_choices < num_experts:
        few = 1 if num_tokens <= 4 else 4  # most experts have no more choices than this
        blocks = (128, few) if num_choices >= 128 else (few,)  # fewer never fill a block of 128
        return (Group(num_experts, 0),), blocks
    if k >= num_experts:
        return (Group(num_experts, 0),), _large_and_small(mean)
    groups = _groups(mean, num_experts) if by_load else _one_group(mean, num_experts)
    at_once = _num_slots(groups) <= CACHED_ROWS
    return groups, (min(64, max(32, mean)),) if at_once else _large_and_small(mean)


def _large_and_small(mean: int) -> tuple[int, int]:
    """Rows per block of a loop over large blocks and one over small ones, where two loops pay.

    A block copies its expert's parameters, which takes as long as computing some sixty rows. Small
    blocks waste least on experts just over the mean; large ones stay fast when nearly all choices
    are left to the loops. Where all experts are computed at once, few choices can be left, and a
    second loop would take longer to compile than it saves.
    """
    block = min(32, max(8, (mean + math.isqrt(mean)) // 2))
    return 16 * block, block


def _one_group(mean: int, num_experts: int) -> tuple[Group, ...]:
    return (Group(num_experts, mean + math.isqrt(mean)),)


def _groups(mean: int, num_experts: int) -> tuple[Group, ...]:
    """The most slots for the quarter of the experts with the most choices.

    Slots are counted in standard deviations of the load above its mean, both under random routing.
    A linear router loads its experts more unevenly, so the first quarter needs many; no expert has
    fewer than the mean, which perfect balance needs. Where all experts are computed at once, rows
    cost little compared with reading the parameters, and two deviations leave almost nothing to the
    loops.
    """
    deviation = math.sqrt(mean)
    if num_experts * mean <= CACHED_ROWS:
        capacity = min(math.ceil(mean + 2 * deviation), CACHED_ROWS // num_experts)
        return (Group(num_experts, capacity),)
    if num_experts < MANY_EXPERTS or num_experts % 4:
        return _one_group(mean, num_experts)
    most, many, rest = (math.ceil(mean + by * deviation) for by in (3.5, 1.2, 0.2))
    quarter = num_experts // 4
    return Group(quarter, most), Group(quarter, many), Group(2 * quarter, rest)
