"""The table: a new rule or schedule joins every property test with one line here."""

from functools import partial

import jax
import jax.numpy as jnp

import moejax

T, D, O, E = 6, 4, 3, 4  # noqa: E741


def root_softplus(logits):
    """The score of DeepSeek-V4."""
    return jnp.sqrt(jax.nn.softplus(logits))


RULES = {
    "softmax": moejax.softmax,
    "top_2": partial(moejax.top_k, k=2),
    "top_2_raw": partial(moejax.top_k, k=2, renormalize=False),
    "top_all": partial(moejax.top_k, k=E),
    "switch": moejax.switch,
    "noisy_top_2": partial(moejax.noisy_top_k, noise_scale=0.5, k=2, key=jax.random.key(7)),
    "gshard_top_2": partial(moejax.gshard_top_2, key=jax.random.key(8)),
    "sigmoid_top_2": partial(moejax.sigmoid_top_k, bias=jnp.arange(E) / 8, k=2, scale=2.5),
    "sigmoid_groups": partial(moejax.sigmoid_top_k, k=2, num_groups=2, kept_groups=1),
    "by_score": partial(moejax.by_score, k=2, scale=2.5),
    "by_score_groups": partial(
        moejax.by_score,
        k=2,
        score=root_softplus,
        bias=jnp.arange(E) / 8,
        num_groups=2,
        group_best=1,
    ),
    "sparsemixer": partial(moejax.sparsemixer, epsilon=0.3),
    "sparsemixer_drawn": partial(moejax.sparsemixer, epsilon=0.3, key=jax.random.key(9)),
    "top_p": partial(moejax.top_p, p=0.6),
    "top_p_3": partial(moejax.top_p, p=0.8, k=3),
    "relu": moejax.relu,
    "hashed": partial(moejax.hashed, token_ids=jnp.arange(T), table=jnp.arange(T) % E),
    "sinkhorn": moejax.sinkhorn,
    "sinkhorn_2": partial(moejax.sinkhorn, k=2),
}

# Each with room for every token, so that nothing is dropped.
SCHEDULES = {
    "dense": moejax.dense,
    "dropless": moejax.dropless,
    "capacity": partial(moejax.capacity, factor=E),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def fourier(params, x):
    """A user's own expert: no layer of the library, no `matmul`."""
    phases = x @ params["frequencies"].astype(x.dtype)
    return jnp.sin(phases) @ params["amplitudes"].astype(x.dtype)


def init_fourier(key):
    one, two = jax.random.split(key)
    return {
        "frequencies": jax.random.normal(one, (D, 5)),
        "amplitudes": jax.random.normal(two, (5, O)),
    }


EXPERTS = {
    "linear": moejax.linear(D, O),
    "mlp": moejax.mlp(D, 5, O, activation=jnp.tanh),
    "glu": moejax.glu(D, 5),
    "clamped": moejax.glu(D, 5, combine=lambda gate, up: (jnp.clip(up, -1, 1) + 1) * gate),
    "gated": moejax.gated(moejax.glu(D, 5), moejax.linear(D, 1)),
    "between": moejax.between(moejax.linear(D, 2), moejax.glu(2, 5), moejax.linear(2, O)),
    "fourier": moejax.Layer(init_fourier, fourier),
}
