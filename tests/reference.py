"""The slow, obvious mixtures that every schedule is held to, and numbers of published systems."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import moejax

GOLDEN = Path(__file__).parent / "golden"


def close(got, expected, rtol=2e-6, atol=None):
    """Every leaf of two trees: ``|a - b| <= atol + rtol |b|``, where atol is rtol by default."""
    atol = rtol if atol is None else atol

    def compare(a, b):
        a, b = (np.asarray(leaf) for leaf in (a, b))
        if a.dtype == jax.dtypes.float0:  # of an integer, which has no gradient
            return
        a, b = (leaf.astype(np.promote_types(leaf.dtype, np.float32)) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(compare, got, expected)


def expert_by(params, e):
    """The parameters of one expert."""
    return jax.tree.map(lambda leaf: leaf[e], params)


@partial(jax.jit, static_argnums=0)  # compiled once, for every token and expert
def _term(expert, params, x, weights, where, t, e):
    """One weight times one expert's output for one token."""
    return weights[where] * expert(expert_by(params, e), x[t][None])[0]


def loop(expert, params, x, routing):
    """Runs one expert on one token at a time: no stacking, no sorting, no einsum."""
    rows = [0.0] * len(x)
    for t, k in np.ndindex(routing.experts.shape):
        e = int(routing.experts[t, k])
        if e < routing.scores.shape[-1]:
            rows[t] = rows[t] + _term(expert, params, x, routing.weights, (t, k), t, e)
    return _stack(rows)


def loop_over_taken(expert, params, x, decision):
    """Runs each expert on the tokens it took, one token at a time."""
    rows = [0.0] * len(x)
    for e, c in np.ndindex(decision.tokens.shape):
        t = int(decision.tokens[e, c])
        if t < len(x):
            rows[t] = rows[t] + _term(expert, params, x, decision.weights, (e, c), t, e)
    return _stack(rows)


def loop_over_slots(expert, params, x, decision):
    """Fills one slot at a time with its mean of the tokens, and runs the slot's expert on it."""
    rows = [0.0] * len(x)
    for e, c in np.ndindex(decision.dispatch.shape[1:]):
        slot = _mean_of_tokens(decision.dispatch, x, e, c)
        for t in range(len(x)):
            rows[t] = rows[t] + _term(expert, params, slot, decision.combine, (t, e, c), 0, e)
    return _stack(rows)


@jax.jit
def _mean_of_tokens(dispatch, x, e, c):
    return sum(dispatch[t, e, c] * x[t] for t in range(len(x)))[None]


def _stack(rows):
    shape = max((jnp.shape(row) for row in rows), key=len)  # a token that goes nowhere is 0.0
    return jnp.stack([jnp.broadcast_to(row, shape) for row in rows])


LOOPS = {
    moejax.DenseRouting: loop,
    moejax.Routing: loop,
    moejax.ExpertChoice: loop_over_taken,
    moejax.SoftSlots: loop_over_slots,
}


def obvious(expert, params, x, decision):
    """The mixture by the loop for the decision's kind."""
    return LOOPS[type(decision)](expert, params, x, decision)


def golden(name):
    """Inputs and outputs of a published system, as NumPy arrays and plain numbers by name."""
    entries = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: _array(value) for key, value in entries.items()}


def _array(value):
    if isinstance(value, dict):
        return np.array(value["data"], value["dtype"]).reshape(value["shape"])
    return value


def by_expert(routing):
    """Choices sorted by expert id, because nothing promises an order of choices."""
    order = np.argsort(routing.experts, axis=-1)
    return (
        np.take_along_axis(np.asarray(routing.experts), order, axis=-1),
        np.take_along_axis(np.asarray(routing.weights), order, axis=-1),
    )
