"""A decoder-only transformer in Flax NNX whose feed-forward layers are layers of moejax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax.interop.flax import to_nnx

Decisions = list[Any]  # one per block, None for a block without a router


class Cache(NamedTuple):
    """The keys and values of the last tokens, in a ring.

    Attributes:
        keys: of every block, [L, B, S, H, W].
        values: of every block, [L, B, S, H, W].
        length: how many tokens have been read, int32.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


class Sizes(NamedTuple):
    """All sizes of the network, except those of its feed-forward layers."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.heads = sizes.heads
        self.inward = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.outward = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """A whole text at once, x [B, S, D]."""
        queries, keys, values = self._projected(x, jnp.arange(x.shape[1]))
        return self._joined(jax.nn.dot_product_attention(queries, keys, values, is_causal=True))

    def step(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One more token, x [B, 1, D], beside the keys and values of the earlier ones."""
        query, key, value = self._projected(x, length[None])
        context = keys.shape[1]
        place = (0, length % context, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, key, place)
        values = jax.lax.dynamic_update_slice(values, value, place)
        filled = jnp.broadcast_to(jnp.arange(context) <= length, (1, 1, 1, context))
        y = jax.nn.dot_product_attention(query, keys, values, mask=filled)
        return self._joined(y), keys, values

    def _projected(self, x: jax.Array, positions: jax.Array) -> list[jax.Array]:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        queries, keys, values = (
            part.reshape(shape) for part in jnp.split(self.inward(x), 3, axis=-1)
        )
        return [rotated(queries, positions), rotated(keys, positions), values]

    def _joined(self, y: jax.Array) -> jax.Array:
        return self.outward(y.reshape(*y.shape[:2], -1))


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions: products of queries and keys depend only on how far apart they are."""
    half = x.shape[-1] // 2
    rates = 1000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = positions.astype(x.dtype)[:, None] * rates  # [S, W / 2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # [S, 1, W / 2]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Block(nnx.Module):
    """Attention, then a layer of moejax; each on a normalised input and added to it."""

    def __init__(self, feed_forward: moejax.Layer, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(sizes.width, rngs=rngs) for _ in range(2)])
        self.attention = Attention(sizes, rngs=rngs)
        self.feed_forward = to_nnx(feed_forward, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
        """A whole text at once."""
        x = x + self.attention(self.norms[0](x))
        return self._fed_forward(x, key)

    def step(self, x: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array) -> Any:
        """One more token."""
        y, keys, values = self.attention.step(self.norms[0](x), keys, values, length)
        x, decision = self._fed_forward(x + y, None)
        return x, decision, keys, values

    def _fed_forward(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
        y, decision = self.feed_forward(self.norms[1](x), key=key)
        return x + y, decision


class Transformer(nnx.Module):
    """Characters in, logits of the next character out, with one decision per block.

    Args:
        feed_forward: a layer whose apply returns ``(y, decision)``, such as a mixture.
        sizes: the rest of the network.
        rngs: for the parameters.
    """

    def __init__(self, feed_forward: moejax.Layer, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        self.embedding = nnx.Embed(
            sizes.vocabulary,
            sizes.width,
            embedding_init=nnx.initializers.normal(sizes.width**-0.5),
            # By default it casts to the precision it was made in, which may not be the params'.
            promote_dtype=lambda arrays, **_: arrays,
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(feed_forward, sizes, rngs=rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Decisions]:
        """Logits [B, S, V] for tokens [B, S]; a key is for the noise of routers."""
        x = self._embedded(tokens)
        decisions = []
        for number, block in enumerate(self.blocks):
            x, decision = block(x, None if key is None else jax.random.fold_in(key, number))
            decisions.append(decision)
        return self.embedding.attend(self.norm(x)), decisions

    def step(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Decisions, Cache]:
        """Logits [B, V] after one more token [B], the decisions, and the cache with that token."""
        x = self._embedded(token[:, None])
        decisions, all_keys, all_values = [], [], []
        for number, block in enumerate(self.blocks):
            x, decision, keys, values = block.step(
                x, cache.keys[number], cache.values[number], cache.length
            )
            decisions.append(decision)
            all_keys.append(keys)
            all_values.append(values)
        cache = Cache(jnp.stack(all_keys), jnp.stack(all_values), cache.length + 1)
        return self.embedding.attend(self.norm(x))[:, 0], decisions, cache

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first token."""
        sizes = self.sizes
        heads = (sizes.heads, sizes.width // sizes.heads)
        shape = (sizes.layers, batch, sizes.context, *heads)
        return Cache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((), jnp.int32))

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        # The embedding is small, so that it can serve as the last layer too; hence the factor.
        return self.embedding(tokens) * self.sizes.width**0.5
