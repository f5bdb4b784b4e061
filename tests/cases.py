"""The table: a new rule, schedule or expert joins every test of its kind with one line here."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from moejax.schedules._sorted.gated_sum import gated_sum
from moejax.schedules._sorted.policy import policy_for_dropless
from moejax.sharding import expert_parallel

T, D, O, E, C = 8, 4, 3, 4, 3  # noqa: E741
AUTO = jax.sharding.AxisType.Auto
MESH = jax.make_mesh((4, 2), ("data", "expert"), (AUTO, AUTO))  # each device has two experts
# Numbers come from NumPy and `device_put`: what else makes an array compiles a program per shape.
BIAS = jax.device_put(np.float32(np.arange(E) / 8))
TOKEN_IDS, TABLE = jax.device_put((np.int32(np.arange(T)), np.int32(np.arange(T) % E)))


def normal(seed, *shape, scale=1.0, dtype=np.float32):
    """Normal numbers."""
    numbers = scale * np.random.default_rng(seed).normal(size=shape)
    return jax.device_put(numbers.astype(dtype))


def params_of(layer, seed=0):
    """Parameters of the shapes and dtypes that `init` gives them."""
    rng = np.random.default_rng(seed)
    draw = lambda like: rng.uniform(-0.5, 0.5, like.shape).astype(like.dtype)  # noqa: E731
    like = jax.eval_shape(layer.init, jax.random.key(0))
    return jax.device_put(jax.tree.map(draw, like))


RULES = {
    "softmax": moejax.softmax,
    "top_2": partial(moejax.top_k, k=2),
    "top_2_raw": partial(moejax.top_k, k=2, renormalize=False),
    "top_all": partial(moejax.top_k, k=E),
    "switch": moejax.switch,
    "noisy_top_2": partial(moejax.noisy_top_k, noise_scale=0.5, k=2, key=jax.random.key(7)),
    "gshard_top_2": partial(moejax.gshard_top_2, key=jax.random.key(8)),
    "sigmoid_top_2": partial(moejax.sigmoid_top_k, bias=BIAS, k=2, scale=2.5),
    "sigmoid_groups": partial(moejax.sigmoid_top_k, k=2, num_groups=2, kept_groups=1),
    "by_score": partial(moejax.by_score, k=2, scale=2.5),
    "by_score_groups": partial(
        moejax.by_score,
        k=2,
        score=moejax.root_softplus,
        bias=BIAS,
        num_groups=2,
        group_best=1,
    ),
    "sparsemixer": partial(moejax.sparsemixer, epsilon=0.3),
    "sparsemixer_drawn": partial(moejax.sparsemixer, epsilon=0.3, key=jax.random.key(9)),
    "top_p": partial(moejax.top_p, p=0.6),
    "top_p_3": partial(moejax.top_p, p=0.8, k=3),
    "relu": moejax.relu,
    "hashed": partial(moejax.hashed, token_ids=TOKEN_IDS, table=TABLE),
    "sinkhorn": moejax.sinkhorn,
    "sinkhorn_2": partial(moejax.sinkhorn, k=2),
}

# Rules by which the slots of experts choose tokens.
SLOT_RULES = {
    "expert_choice": partial(moejax.expert_choice, capacity=C),
    "soft_slots": moejax.soft_slots,
}


def on_accelerators(expert, params, x, routing):
    """`dropless` as accelerators run it."""
    num_tokens, num_experts = routing.scores.shape
    k = routing.experts.shape[1]
    policy = policy_for_dropless(expert, num_tokens, num_experts, k, platform="gpu")
    return gated_sum(expert, params, x, routing.experts, routing.weights, policy)


# Each with room for every token, so that nothing is dropped.
ONE_DEVICE = {
    "dense": moejax.dense,
    "dropless": moejax.dropless,
    "dropless on accelerators": on_accelerators,
    "capacity": partial(moejax.capacity, factor=E),
}
# In one round; test_expert_parallel has those that take several.
ON_MESH = expert_parallel(MESH, factor=E, local=moejax.dense)
SCHEDULES = {**ONE_DEVICE, "expert_parallel": ON_MESH}
SLOT_SCHEDULES = {"gather_slots": moejax.gather_slots, "mix_slots": moejax.mix_slots}

# Which schedule runs the decisions of which rule.
PAIRS = [(schedule, rule) for schedule in SCHEDULES for rule in RULES]
PAIRS += zip(SLOT_SCHEDULES, SLOT_RULES, strict=True)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def logits_for(rule, seed=2):
    """Router outputs of the shape that a rule takes."""
    shape = (T, E, C) if rule == "soft_slots" else (T, E)
    return normal(seed, *shape, scale=2)


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


def pixelwise(params, x):
    """A user's own expert on images, ``[T, 3, 2, D] -> [T, 2, O]``: colours mixed, rows summed."""
    colours = jnp.einsum("thwd,do->thwo", x, params["kernel"].astype(x.dtype))
    return jnp.tanh(colours + params["bias"].astype(x.dtype)).sum(axis=1)


def init_pixelwise(key):
    one, two = jax.random.split(key)
    return {"kernel": jax.random.normal(one, (D, O)), "bias": jax.random.normal(two, (1, 1, 1, O))}


EXPERTS = {
    "linear": moejax.linear(D, O),
    "mlp": moejax.mlp(D, 5, O, activation=jnp.tanh),
    "glu": moejax.glu(D, 5),
    "clamped": moejax.glu(D, 5, combine=lambda gate, up: (jnp.clip(up, -1, 1) + 1) * gate),
    "gated": moejax.gated(moejax.glu(D, 5), moejax.linear(D, 1)),
    "between": moejax.between(moejax.linear(D, 2), moejax.glu(2, 5), moejax.linear(2, O)),
    "fourier": moejax.Layer(init_fourier, fourier),
    "pixelwise": moejax.Layer(init_pixelwise, pixelwise),
}


@cache
def problem(expert, dtype=jnp.float32):
    """Parameters of E experts, and tokens in a dtype; images for an expert that takes them."""
    features = (3, 2, D) if expert == "pixelwise" else (D,)
    wide = np.promote_types(dtype, jnp.float32)
    params, x = params_of(moejax.stack(EXPERTS[expert], E)), normal(1, T, *features, dtype=wide)
    return jax.tree.map(lambda leaf: leaf.astype(wide), params), x.astype(dtype)


def unit(d_in, d_out):
    """A layer that is undefined at zero."""

    def apply(params, x):
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ params

    return moejax.Layer(lambda key: jax.random.normal(key, (d_in, d_out)), apply)
