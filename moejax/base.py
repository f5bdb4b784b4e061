"""The vocabulary of every other module; there is no algorithm in this file.

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
Params = Any
"""A pytree of arrays, the parameters of a layer."""
Matmul = Callable[[Array, Array], Array]  # (x [T, D], kernel [D, O]) -> [T, O]


class Expert(Protocol):
    """One expert, ``(params, x [T, ...]) -> y [T, ...]``: a token's output depends on it alone.

    A schedule decides which rows an expert sees together, so the expert must treat tokens (axis 0
    of x) independently of each other.

    Example:
        >>> def fourier(params, x):
        ...     return jnp.sin(x @ params["frequencies"]) @ params["amplitudes"]
        >>> params = {"frequencies": jnp.ones((2, 3, 8)), "amplitudes": jnp.ones((2, 8, 4))}
        >>> moejax.mixture(fourier, params, jnp.ones((5, 3)), jnp.ones((5, 2)) / 2).shape
        (5, 4)
    """

    def __call__(self, params: Params, x: Array, /) -> Array: ...  # noqa: D102


class Rule(Protocol):
    """A rule, ``logits -> decision``: which token goes to which expert. It has no parameters.

    The first argument is the router's output, [T, E]. A router that returns several arrays gives
    the rule as many arguments. A rule that draws noise has an argument ``key``, and one that must
    know the padding has ``mask``; `moe` passes these two by name to the rules that have them.

    Example:
        >>> def second_best(logits):
        ...     best_two = moejax.top_k(logits, k=2, renormalize=False)
        ...     return best_two._replace(
        ...         experts=best_two.experts[:, 1:], weights=best_two.weights[:, 1:]
        ...     )
        >>> second_best(jnp.array([[3.0, 1.0, 2.0]])).experts
        Array([[2]], dtype=int32)
    """

    def __call__(self, logits: Array, /, *outputs: Any, **options: Any) -> Any: ...  # noqa: D102


class Schedule(Protocol):
    r"""A schedule, ``(expert, params, x, decision) -> y``: one way to compute the gated sum.

    All schedules for one kind of decision return the same sum, and differ only in cost. The leaves
    of ``params`` have a leading axis E.

    .. math:: y_t = \sum_e g_{te}\, E_e(x_t)

    Example:
        >>> def limited(expert, params, x, decision):
        ...     decision = moejax.limit_capacity(decision, capacity=3)
        ...     return moejax.dropless(expert, params, x, decision)
        >>> layer = moejax.linear(4, 4)
        >>> model = moejax.moe(layer, layer, num_experts=4, route=moejax.switch, execute=limited)
        >>> y, routing = model.apply(model.init(jax.random.key(0)), jnp.ones((5, 4)))
        >>> int((y != 0).any(axis=1).sum())  # all five tokens choose one expert, which takes three
        3
    """

    def __call__(  # noqa: D102
        self, expert: Expert, params: Params, x: Array, decision: Any, /
    ) -> Array: ...


class Layer(NamedTuple):
    """A pair of pure functions; everything that has parameters is a layer.

    Attributes:
        init: ``key -> params``, where params is a pytree of arrays.
        apply: ``(params, x, ...) -> y``.

    Example:
        >>> scale = Layer(lambda key: jnp.ones(3), lambda params, x: params * x)
        >>> scale.apply(scale.init(jax.random.key(0)), jnp.array([1.0, 2.0, 3.0]))
        Array([1., 2., 3.], dtype=float32)
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

    Example:
        >>> routing = moejax.top_k(jnp.array([[0.0, 2.0, 2.0]]), k=2)
        >>> routing.experts, routing.weights
        (Array([[1, 2]], dtype=int32), Array([[0.5, 0.5]], dtype=float32))
        >>> routing.gates, routing.counts
        (Array([[0. , 0.5, 0.5]], dtype=float32), Array([0, 1, 1], dtype=int32))
    """

    experts: Array
    weights: Array
    scores: Array
    logits: Array
    chances: Array | None = None

    @property
    def num_experts(self) -> int:
        """E, from the shape of the scores; checks the ids, as whatever reads them reads E first.

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
        """``g_te``, the weights laid out by expert, zero for an expert not chosen, shape [T, E]."""
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
        return by_expert(self.experts, ones, self.num_experts).sum(axis=0, dtype=jnp.int32)

    @property
    def present(self) -> Array:
        """Which tokens go to an expert at all, which padding does not, shape [T]."""
        return self.chosen.any(axis=-1)


class DenseRouting(Routing):
    """A token-choice decision in which every token that is not padding goes to every expert.

    K = E. The type says so, since a shape cannot: `relu` has K = E, too, and leaves most experts
    out. `moe` computes this decision with `dense` by default, and any other with `dropless`.

    Example:
        >>> type(moejax.softmax(jnp.zeros((1, 3)))) is DenseRouting
        True
    """


class ExpertChoice(NamedTuple):
    """A decision in which every expert takes C tokens; its schedule is `gather_slots`.

    Attributes:
        tokens: chosen tokens, integers in [0, T], where T is an empty slot, shape [E, C].
        weights: their gates, zero in an empty slot, shape [E, C].
        scores: probabilities over experts, zero for a masked token, shape [T, E].
        logits: the router's output, shape [T, E].

    Example:
        >>> decision = moejax.expert_choice(jnp.array([[2.0, 0.0], [1.0, 5.0]]), capacity=1)
        >>> decision.tokens
        Array([[0],
               [1]], dtype=int32)
    """

    tokens: Array
    weights: Array
    scores: Array
    logits: Array

    @property
    def present(self) -> Array:
        """Which tokens are not padding, shape [T]."""
        return self.scores.any(axis=-1)


class SoftSlots(NamedTuple):
    """A decision in which every slot takes a mean of all tokens; its schedule is `mix_slots`.

    Attributes:
        dispatch: share of a token in a slot, which sums to one over tokens, shape [T, E, C].
        combine: share of a slot in a token's output, which sums to one over slots, shape [T, E, C].
        logits: the router's output, shape [T, E, C].

    Example:
        >>> decision = moejax.soft_slots(jnp.zeros((4, 2, 1)))  # 4 tokens, 2 slots, all alike
        >>> decision.dispatch[0, 0], decision.combine[0, 0]
        (Array([0.25], dtype=float32), Array([0.5], dtype=float32))
    """

    dispatch: Array
    combine: Array
    logits: Array

    @property
    def present(self) -> Array:
        """Which tokens are not padding, shape [T]."""
        return self.combine.any(axis=(1, 2))
