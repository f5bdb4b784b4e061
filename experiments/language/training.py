"""Training and evaluation of a language model, as pure functions of its state and the text."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.kinds import KINDS
from language.contenders import Network
from moejax import expert_by_class, expert_load
from moejax.training import TrainState, init_state, train_step

WARM_UP = 100  # steps
EVALUATED_AT_ONCE = 64  # windows


class Windows(NamedTuple):
    """Windows of the validation text, with the kind of every character."""

    characters: jax.Array  # [N, S + 1]
    kinds: jax.Array  # [N, S + 1]


def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW, its rate up to the peak and down to zero along a cosine."""

    def rate(count: jax.Array) -> jax.Array:
        taken = count.astype(jnp.float32)
        up = jnp.minimum((taken + 1) / WARM_UP, 1)
        return peak * up * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(taken / steps, 1)))

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01)
    )


def start(network: Network, optimize: optax.GradientTransformation, seed: Any) -> TrainState:
    """The state before the first step, a function of the seed."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_state(network.init(init_key), optimize, run_key)


def cross_entropies(logits: jax.Array, characters: jax.Array) -> jax.Array:
    """The cross-entropy of every next character, in nats, [B, S]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, characters[:, 1:])


def objective(
    network: Network, params: Any, characters: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy plus the balance losses; the metric is the cross-entropy alone."""
    characters = characters.astype(jnp.int32)
    logits, decisions = network.apply(params, characters[:, :-1], key)
    mean = cross_entropies(logits, characters).mean()
    return mean + network.balance(decisions), {"cross_entropy": mean}


def batch_at(text: jax.Array, state: TrainState, batch_size: int, context: int) -> jax.Array:
    """The windows of a step, a function of the run's key and the step: [B, S + 1]."""
    order_key, _ = jax.random.split(state.key)
    step_key = jax.random.fold_in(order_key, state.step)
    starts = jax.random.randint(step_key, (batch_size, 1), 0, len(text) - context)
    return text[starts + jnp.arange(context + 1)]


def advance(
    network: Network,
    optimize: optax.GradientTransformation,
    batch_size: int,
    context: int,
    state: TrainState,
    text: jax.Array,
    stop: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """Steps until ``stop``; the state, and the mean cross-entropy of these steps.

    One compiled program takes any number of steps, so a run gives the same bits however it is
    divided.
    """
    step = train_step(partial(objective, network), optimize)
    first = state.step

    def take(carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, total = carry
        state, metrics = step(state, batch_at(text, state, batch_size, context))
        return state, total + metrics["cross_entropy"]

    state, total = jax.lax.while_loop(
        lambda carry: carry[0].step < stop, take, (state, jnp.zeros(()))
    )
    return state, total / (stop - first).astype(jnp.float32)


def windows_of(characters: np.ndarray, kinds: np.ndarray, context: int, count: int) -> Windows:
    """Windows at equal distances, as many as were asked for or as the text has."""
    most = (len(characters) - 1) // context
    # A whole number of batches, so that one compiled evaluation serves all.
    batches = max(1, min(count, most) // EVALUATED_AT_ONCE)
    starts = np.linspace(0, len(characters) - context - 1, batches * EVALUATED_AT_ONCE).astype(int)
    places = starts[:, None] + np.arange(context + 1)
    return Windows(jnp.asarray(characters[places]), jnp.asarray(kinds[places]))


def evaluate(network: Network, params: Any, windows: Windows) -> dict[str, jax.Array]:
    """Loss in nats per character, and for each block what its router did.

    Returns:
        ``loss``, and for a mixture ``load`` [L, E], ``dead_experts`` [L] and ``by_kind``
        [L, E, kinds], sums of the gate.
    """

    def one(batch: Windows) -> dict[str, jax.Array]:
        characters = batch.characters.astype(jnp.int32)
        logits, decisions = network.apply(params, characters[:, :-1], None)
        result = {"loss": cross_entropies(logits, characters).mean()}
        if decisions[0] is None:
            return result
        kinds = batch.kinds[:, :-1].reshape(-1).astype(jnp.int32)
        by_kind = [expert_by_class(routing, kinds, len(KINDS)) for routing in decisions]
        load = [expert_load(routing) for routing in decisions]
        return result | {"by_kind": jnp.stack(by_kind), "load": jnp.stack(load)}

    batches = jax.tree.map(lambda a: a.reshape(-1, EVALUATED_AT_ONCE, *a.shape[1:]), windows)
    results = jax.lax.map(one, batches)
    summary = {"loss": results["loss"].mean()}
    if "load" not in results:
        return summary
    load = results["load"].mean(axis=0)  # [L, E]
    dead = jnp.sum(load == 0, axis=-1)
    return summary | {"load": load, "dead_experts": dead, "by_kind": results["by_kind"].sum(axis=0)}
