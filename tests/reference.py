"""The slow, obvious mixtures that every schedule is held to, and numbers of published systems."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_vjp

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


def check_gradients(function, *arguments, order=1):
    """`jax.test_util.check_grads` in float64 and reverse mode, by one program for each order.

    It would compile three: the values, and each half of the derivative.
    """

    @jax.jit
    def both(cotangent, *given):
        values, pull = jax.vjp(function, *given)
        return values, pull(cotangent)

    def values(*given):
        return both(zeros, *given)[0]

    def values_and_pullback(*given):
        return values(*given), lambda cotangent: both(cotangent, *given)[1]

    like = jax.eval_shape(function, *arguments)
    zeros = jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), like)
    check_vjp(values, values_and_pullback, arguments, atol=1e-6, rtol=1e-6, eps=1e-6)

    def gradients(*given):
        values, pull = jax.vjp(function, *given)
        return pull(values)

    if order > 1:
        check_gradients(gradients, *arguments, order=order - 1)


def expert_by(params, e):
    """The parameters of one expert."""
    return jax.tree.map(lambda leaf: leaf[e], params)


@partial(jax.jit, static_argnums=0)  # compiled once, for every token and expert
def _term(expert, params, x, weights, where, t, e):
    """One weight times one expert's output for one token."""
    return weights[where] * expert(expert_by(params, e), x[t][None])[0]


@partial(jax.jit, static_argnums=0)
def _gradients_of_term(expert, cotangent, params, x, weights, where, t, e):
    """By parameters, tokens and weights, where the term is multiplied by the cotangent."""
    term = lambda *given: _term(expert, *given, where, t, e)  # noqa: E731
    return jax.vjp(term, params, x, weights)[1](cotangent)


def chosen(routing, num_tokens):
    """Where each weight stands, and its token and expert: of every choice that goes somewhere."""
    for t, k in np.ndindex(num_tokens, routing.experts.shape[1]):
        e = int(routing.experts[t, k])
        if e < routing.scores.shape[-1]:
            yield (t, k), t, e


def taken(decision, num_tokens):
    """The same where experts take tokens."""
    for e, c in np.ndindex(decision.tokens.shape):
        t = int(decision.tokens[e, c])
        if t < num_tokens:
            yield (e, c), t, e


TERMS = {moejax.DenseRouting: chosen, moejax.Routing: chosen, moejax.ExpertChoice: taken}


def loop(expert, params, x, decision):
    """Runs one expert on one token at a time: no stacking, no sorting, no einsum."""
    rows = [0.0] * len(x)
    for where, t, e in TERMS[type(decision)](decision, len(x)):
        rows[t] = rows[t] + _term(expert, params, x, decision.weights, where, t, e)
    return _stack(rows)


def loop_of_gradients(expert, params, x, decision, cotangent):
    """Sums the gradients of one term at a time; beside the weights, a decision has none."""
    total = jax.tree.map(np.zeros_like, (params, x, decision.weights))
    for where, t, e in TERMS[type(decision)](decision, len(x)):
        given = cotangent[t], params, x, decision.weights
        total = jax.tree.map(np.add, total, _gradients_of_term(expert, *given, where, t, e))
    to_params, to_x, to_weights = total
    return to_params, to_x, jax.tree.map(_zero, decision)._replace(weights=to_weights)


def _zero(leaf):
    """The gradient of what is not used."""
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return np.zeros(leaf.shape, leaf.dtype if inexact else jax.dtypes.float0)


@partial(jax.jit, static_argnums=0)
def _share_of_slot(expert, params, x, decision, e, c):
    """What one slot adds to every token: its expert's output for its mean of the tokens."""
    slot = sum(decision.dispatch[t, e, c] * x[t] for t in range(len(x)))
    output = expert(expert_by(params, e), slot[None])[0]
    return jnp.stack([decision.combine[t, e, c] * output for t in range(len(x))])


@partial(jax.jit, static_argnums=0)
def _gradients_of_share(expert, cotangent, params, x, decision, e, c):
    """By parameters, tokens and decision, where the share is multiplied by the cotangent."""
    share = lambda *given: _share_of_slot(expert, *given, e, c)  # noqa: E731
    return jax.vjp(share, params, x, decision)[1](cotangent)


def loop_over_slots(expert, params, x, decision):
    """Fills one slot at a time, and runs the slot's expert on it."""
    slots = np.ndindex(decision.dispatch.shape[1:])
    return sum(np.asarray(_share_of_slot(expert, params, x, decision, e, c)) for e, c in slots)


def gradients_over_slots(expert, params, x, decision, cotangent):
    """Sums the gradients of one slot at a time."""
    total = jax.tree.map(np.zeros_like, (params, x, decision))
    for e, c in np.ndindex(decision.dispatch.shape[1:]):
        gradients = _gradients_of_share(expert, cotangent, params, x, decision, e, c)
        total = jax.tree.map(np.add, total, gradients)
    return total


def _stack(rows):
    shape = max((jnp.shape(row) for row in rows), key=len)  # a token that goes nowhere is 0.0
    return jnp.stack([jnp.broadcast_to(row, shape) for row in rows])


LOOPS = dict.fromkeys(TERMS, (loop, loop_of_gradients))
LOOPS[moejax.SoftSlots] = (loop_over_slots, gradients_over_slots)


def obvious(expert, params, x, decision):
    """The mixture by the loop for the decision's kind."""
    return LOOPS[type(decision)][0](expert, params, x, decision)


def obvious_gradients(expert, params, x, decision, cotangent):
    """Of the mixture, by parameters, tokens and decision, for a cotangent of its output."""
    return LOOPS[type(decision)][1](expert, params, x, decision, cotangent)


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
