"""The vocabulary that every other module speaks; no algorithm is in this file.

    tokens -> router -> rule -> decision -> schedule -> sum

The letters are the same in names, docstrings, comments and einsums:
T tokens, E experts, K experts per token, C slots per expert, D input width, F hidden width,
O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moejax._arrays import by_expert

Array = jax.Array
Params = Any  # a pytree of arrays
Matmul = Callable[[Array, Array], Array]  # (x [T, D], kernel [D, O]) -> [T, O]


class Expert(Protocol):
    """One expert, ``(params, x [T, ...]) -> y [T, ...]``: a token's output depends on it alone.

    A schedule decides which rows an expert sees together, so it must treat tokens (axis 0 of x)
    independently of each other.
    """

    def __call__(self, params: Params, x: Array, /) -> Array: ...  # noqa: D102


class Rule(Protocol):
    """A rule, ``logits -> decision``: which token goes to which expert. It has no parameters.

    The first argument is the router's output, [T, E]. A router that returns several arrays gives
    the rule as many arguments. A rule that draws noise names ``key``, and one that must know the
    padding names ``mask``; `moe` passes these two by name, where they are asked for.
    """

    def __call__(self, logits: Array, /, *outputs: Any, **options: Any) -> Any: ...  # noqa: D102


class Schedule(Protocol):
    """A schedule, ``(expert, params, x, decision) -> y``: one way to compute the gated sum.

    Every schedule of one kind of decision returns the same sum, ``y_t = sum_e g_te E_e(x_t)``,
    and differs from the others in cost alone. The leaves of ``params`` have a leading axis E.
    """

    def __call__(  # noqa: D102
        self, expert: Expert, params: Params, x: Array, decision: Any, /
    ) -> Array: ...


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
        experts: chosen experts, integers in [0, E] of a dtype that holds E, shape [T, K].
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
        """E, from the shape of the scores. Whatever reads the ids reads E first, so it checks them.

        Raises:
            ValueError: if the ids cannot hold E, "nowhere", which would wrap round to an expert.
        """
        num_experts, ids = self.scores.shape[-1], self.experts.dtype
        if not jnp.issubdtype(ids, jnp.integer) or jnp.iinfo(ids).max < num_experts:
            raise ValueError(
                f"`experts` must be integers that can hold the number of experts, {num_experts}, "
                f"which means nowhere, got {ids}: cast them with experts.astype(jnp.int32)."
            )
        return num_experts

    @property
    def chosen(self) -> Array:
        """Which choices go to an expert at all, shape [T, K]."""
        num_experts = self.num_experts
        return (self.experts >= 0) & (self.experts < num_experts)

    @property
    def gates(self) -> Array:
        """``g_te``, the weights laid out by expert, zero where none was chosen, shape [T, E]."""
        return by_expert(self.experts, self.weights, self.num_experts)

    @property
    def chooses(self) -> Array:
        """Whether token t chose expert e, whatever the weight, shape [T, E]."""
        ones = jnp.ones_like(self.experts, jnp.int32)
        return by_expert(self.experts, ones, self.num_experts) > 0

    @property
    def counts(self) -> Array:
        """How many choices go to each expert, int32 [E], which holds fewer than 2^31 choices."""
        ones = jnp.ones_like(self.experts, jnp.int32)
        return by_expert(self.experts, ones, self.num_experts).sum(axis=0)

    @property
    def present(self) -> Array:
        """Which tokens are no padding: those that go to an expert at all, shape [T]."""
        return self.chosen.any(axis=-1)


class DenseRouting(Routing):
    """A token-choice decision in which every token that is no padding goes to every expert.

    K = E. The type says so, since a shape cannot: `relu` has K = E, too, and leaves most experts
    out. `moe` computes this decision with `dense` by default, and any other with `dropless`.
    """


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
