"""The slow, obvious mixture that every schedule is held to."""

import jax
import jax.numpy as jnp


def loop(expert, params, x, routing):
    """Runs one expert on one token at a time: no stacking, no sorting, no einsum."""
    num_experts = routing.scores.shape[-1]
    rows = []
    for t in range(len(x)):
        row = 0.0
        for k in range(routing.experts.shape[1]):
            e = int(routing.experts[t, k])
            if e < num_experts:
                own = jax.tree.map(lambda leaf, e=e: leaf[e], params)
                row = row + routing.weights[t, k] * expert(own, x[t : t + 1])[0]
        rows.append(row)
    return jnp.stack([jnp.broadcast_to(row, rows[0].shape) for row in rows])
