"""Who competes: a dense network, a sparse one, and a dense one as large as the sparse one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from language.transformer import Decisions, Sizes, Transformer
from parts.routes import ROUTES, asks_for_k, load, nothing

Execute = Callable[..., jax.Array]
Balance = Callable[[Any], jax.Array]

_OTHERS = "a token's experts depend on the tokens after it, which it has to predict"
NOT_CAUSAL = {
    "expert-choice": f"experts choose among all tokens of the batch, so {_OTHERS}",
    "soft-moe": f"every slot mixes all tokens of the batch, so {_OTHERS}",
    "sinkhorn": f"its plan balances all tokens of the batch, so {_OTHERS}",
}
RULES = [name for name in ROUTES if name not in NOT_CAUSAL]


class Network(NamedTuple):
    """A language model as pure functions.

    Attributes:
        init: ``key -> params``, nested dicts of arrays.
        apply: ``(params, tokens [B, S], key) -> (logits [B, S, V], decisions)``.
        module: ``params -> Transformer``, for sampling.
        balance: ``decisions -> scalar``, added to the cross-entropy.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., tuple[jax.Array, Decisions]]
    module: Callable[[Any], Transformer]
    balance: Callable[[Decisions], jax.Array]


class Mixture(NamedTuple):
    """The sizes of a mixture: E experts of hidden width F, of which K see a token."""

    num_experts: int
    k: int
    hidden: int


def dense(sizes: Sizes, mixture: Mixture, execute: Execute | None) -> Network:
    """One expert as wide as the K that see a token: equal active parameters."""
    return network(unrouted(sizes.width, mixture.k * mixture.hidden), sizes, nothing)


def dense_total(sizes: Sizes, mixture: Mixture, execute: Execute | None) -> Network:
    """One expert as wide as all E: equal total parameters."""
    return network(unrouted(sizes.width, mixture.num_experts * mixture.hidden), sizes, nothing)


def by_rule(name: str, sizes: Sizes, mixture: Mixture, execute: Execute | None) -> Network:
    """A mixture with one of the rules of `parts.routes`."""
    route = ROUTES[name]
    experts = moejax.moe(
        moejax.glu(sizes.width, mixture.hidden),
        route.router(moejax.linear(sizes.width, mixture.num_experts)),
        num_experts=mixture.num_experts,
        route=route.rule(mixture.k),
        execute=execute,
    )
    return network(experts, sizes, route.balance)


def sparse(sizes: Sizes, mixture: Mixture, execute: Execute | None) -> Network:
    """The K best of E experts, with the load balancing loss."""
    experts = moejax.moe(
        moejax.glu(sizes.width, mixture.hidden),
        moejax.linear(sizes.width, mixture.num_experts, bias=False),
        num_experts=mixture.num_experts,
        route=partial(moejax.top_k, k=mixture.k),
        execute=execute,
    )
    return network(experts, sizes, load)


CONTENDERS = {"dense": dense, "sparse": sparse, "dense_total": dense_total}
NETWORKS = CONTENDERS | {name: partial(by_rule, name) for name in RULES}
CHOOSE_K = ["sparse", *(name for name in RULES if asks_for_k(ROUTES[name]))]


def unrouted(width: int, hidden: int) -> moejax.Layer:
    """A network in place of a mixture; its decision is None."""
    layer = moejax.glu(width, hidden)
    return moejax.Layer(layer.init, lambda params, x, **_: (layer.apply(params, x), None))


def network(feed_forward: moejax.Layer, sizes: Sizes, balance: Balance) -> Network:
    """A transformer with this feed-forward layer, taken apart into pure functions."""

    def make(key: jax.Array) -> Transformer:
        return Transformer(feed_forward, sizes, rngs=nnx.Rngs(params=key))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(make(key)))

    def module(params: Any) -> Transformer:
        state = nnx.clone(shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def apply(params: Any, tokens: jax.Array, key: jax.Array | None = None) -> Any:
        return module(params)(tokens, key)

    def summed(decisions: Decisions) -> jax.Array:
        return sum((balance(one) for one in decisions if one is not None), start=jnp.zeros(()))

    return Network(init, apply, module, summed)


def count(network: Network) -> tuple[int, int]:
    """How many parameters a token uses, and how many there are."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    _, decisions = jax.eval_shape(network.apply, params, tokens)
    total = experts = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        total += leaf.size
        experts += leaf.size * ("['experts']" in jax.tree_util.keystr(path))
    routing = decisions[0]
    if routing is None:
        return total, total
    k, num_experts = routing.experts.shape[-1], routing.scores.shape[-1]
    return total - experts + experts * k // num_experts, total
