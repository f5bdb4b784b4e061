"""Text from a model, one character at a time; the keys and values of earlier ones are kept."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from language.contenders import Network
from language.transformer import Decisions


class Sample(NamedTuple):
    """A text that a model wrote.

    Attributes:
        characters: ids, [N]; the prompt first.
        experts: the one with most weight for each character, by block, [L, N]; None without
            routers.
        tokens_per_second: of the whole, prompt included.
    """

    characters: np.ndarray
    experts: np.ndarray | None
    tokens_per_second: float


def write(
    network: Network,
    params: Any,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array | None]:
    """The prompt [P] and what follows, ``length`` characters in all, with their experts.

    Every step reads one character, so a mixture runs that character's K experts and no others.
    """
    given = jnp.zeros(length, jnp.int32).at[: len(prompt)].set(prompt[:length])
    model = network.module(params)

    def step(carry: tuple[Any, jax.Array], number: jax.Array) -> tuple[Any, Any]:
        cache, drawn = carry
        character = jnp.where(number < len(prompt), given[number], drawn)
        logits, decisions, cache = model.step(character[None], cache)
        drawn = jax.random.categorical(jax.random.fold_in(key, number), logits[0] / temperature)
        return (cache, drawn.astype(jnp.int32)), (character, _best(decisions))

    first = (model.empty_cache(1), jnp.zeros((), jnp.int32))
    _, (characters, experts) = jax.lax.scan(step, first, jnp.arange(length))
    return characters, experts


def sample(
    network: Network, params: Any, prompt: jax.Array, length: int, temperature: float
) -> Sample:
    """Writes a text, and times it without the compilation."""
    program = jax.jit(partial(write, network, length=length, temperature=temperature))
    given = (params, prompt.astype(jnp.int32), jax.random.key(0))
    run = program.lower(*given).compile()
    began = time.perf_counter()
    characters, experts = jax.block_until_ready(run(*given))
    rate = length / (time.perf_counter() - began)
    return Sample(np.asarray(characters), None if experts is None else np.asarray(experts.T), rate)


def _best(decisions: Decisions) -> jax.Array | None:
    if decisions[0] is None:
        return None
    chosen = [routing.experts[0, routing.weights[0].argmax()] for routing in decisions]
    return jnp.stack(chosen)  # [L]
