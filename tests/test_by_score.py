"""The rules that published models share: by score, sparsemixer, top-p."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax as np_softmax

import moejax
from cases import normal
from reference import by_expert, golden

LOGITS = normal(3, 64, 8, scale=2)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_deepseek_is_a_sigmoid_with_groups_by_their_two_best():
    peer = golden("deepseek_v3")
    route = partial(
        moejax.by_score, k=2, score=jax.nn.sigmoid, num_groups=4, kept_groups=2, scale=2.5
    )
    routing = route(jnp.asarray(peer["logits"]), jnp.asarray(peer["bias"]))
    np.testing.assert_array_equal(by_expert(routing)[0], peer["indices"])
    np.testing.assert_allclose(by_expert(routing)[1], peer["weights"], rtol=1e-6)


def test_groups_by_their_maximum_are_not_deepseek():
    peer = golden("deepseek_v3")
    routing = moejax.by_score(
        jnp.asarray(peer["logits"]),
        jnp.asarray(peer["bias"]),
        k=2,
        score=jax.nn.sigmoid,
        num_groups=4,
        kept_groups=2,
        group_best=1,
    )
    assert (by_expert(routing)[0] != peer["indices"]).any()


def test_groups_are_judged_by_their_best_experts():
    # Two groups: one best expert, or two good ones.
    logits = np.log(np.float32([[0.40, 0.05, 0.30, 0.25]]))
    choose = partial(moejax.by_score, logits, k=2, num_groups=2)
    same(choose(group_best=1).experts, [[0, 1]])
    same(choose(group_best=2).experts, [[2, 3]])


def test_a_group_that_is_left_out_loses_to_negative_scores():
    logits = jnp.array([[3.0, 2.0, -1.0, -2.0]])
    bias = jnp.array([-5.0, -5.0, -9.0, -9.0])
    routing = moejax.by_score(logits, bias, k=2, num_groups=2)
    same(routing.experts, [[0, 1]])


def test_the_bias_chooses_and_does_not_weigh():
    bias = jnp.array([0.0, 0.0, 0.0, 9.0])
    routing = moejax.by_score(np.log(np.float32([[0.4, 0.3, 0.2, 0.1]])), bias, k=2)
    same(routing.experts, [[3, 0]])
    np.testing.assert_allclose(routing.weights, [[0.2, 0.8]], rtol=1e-6)
    total = lambda bias: moejax.by_score(LOGITS, bias, k=2).weights.sum()  # noqa: E731
    assert not np.any(jax.jit(jax.grad(total))(np.zeros(8, np.float32)))


@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k_is_by_score_with_a_softmax(renormalize):
    routing = moejax.by_score(LOGITS, k=3, renormalize=renormalize)
    expected = moejax.top_k(LOGITS, k=3, renormalize=renormalize)
    same(routing.experts, expected.experts)
    np.testing.assert_allclose(routing.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(routing.scores, expected.scores, rtol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_top_k_is_by_score_with_a_sigmoid(renormalize):
    bias = np.linspace(-1, 1, 8, dtype=np.float32)
    options = {"k": 3, "num_groups": 4, "kept_groups": 2, "renormalize": renormalize, "scale": 2.5}
    routing = moejax.by_score(LOGITS, bias, score=jax.nn.sigmoid, **options)
    expected = moejax.sigmoid_top_k(LOGITS, bias, **options)
    same(routing.experts, expected.experts)
    np.testing.assert_allclose(routing.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(routing.scores, expected.scores, rtol=1e-5)


def test_the_presets_are_bit_for_bit_their_formulas():
    kept, experts = jax.lax.top_k(LOGITS, 3)
    routing = moejax.top_k(LOGITS, k=3)
    same((routing.experts, routing.weights), (experts, jax.nn.softmax(kept)))
    bias = jnp.linspace(-1, 1, 8)
    experts = jax.lax.top_k(jax.nn.sigmoid(LOGITS) + bias[None], 3)[1]
    logs = jnp.take_along_axis(jax.nn.log_sigmoid(LOGITS), experts, axis=-1)
    routing = moejax.sigmoid_top_k(LOGITS, bias, k=3, scale=2.5)
    same((routing.experts, routing.weights), (experts, 2.5 * jax.nn.softmax(logs)))


def test_the_presets_work_where_scores_underflow():
    logits = jnp.array([[-200.0, -201.0, -202.0]])
    same(moejax.sigmoid_top_k(logits, k=2).experts, [[0, 1]])
    expected = np_softmax([[0.0, -1.0]])
    np.testing.assert_allclose(moejax.sigmoid_top_k(logits, k=2).weights, expected, rtol=1e-6)
    far = jnp.array([[0.0, -200.0, -190.0]])
    same(moejax.top_k(far, k=2).experts, [[0, 2]])


def test_a_sum_that_underflows_is_zero_and_not_nan():
    gates = lambda logits: moejax.by_score(logits, k=2, score=jax.nn.sigmoid).weights.sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(gates))(np.full((1, 3), -200, np.float32))
    assert value.item() == 0
    assert not np.any(gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "between 1 and the number of experts"),
        ({"k": 1}, "`by_score\\(k=1, renormalize=True\\)`"),
        (
            {"k": 2, "num_groups": 3},
            "`num_groups` must divide the number of experts \\(8\\), got 3",
        ),
        ({"k": 2, "num_groups": 2.0}, "`num_groups` must divide the number of experts"),
        ({"k": 2, "num_groups": 2, "kept_groups": 1.0}, "`kept_groups` must be between 1 and"),
        ({"k": 5, "num_groups": 2}, "leave at least k = 5 experts"),
        ({"k": 2, "num_groups": 2, "group_best": 0}, "`group_best` must be an integer"),
        ({"k": 2, "bias": jnp.zeros(1)}, "one number per expert, \\[8\\], got \\[1\\]"),
    ],
)
def test_useless_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        moejax.by_score(LOGITS, **options)


def phimoe(scores, epsilon):
    """The evaluation of Phi-3.5-MoE, from its description, in NumPy."""
    experts, weights, closed = [], [], np.zeros(scores.shape, bool)
    for _ in range(2):
        free = np.where(closed, -np.inf, scores)
        best = free.max(axis=-1, keepdims=True)
        far = (best - scores) / np.maximum(np.abs(scores), best) > 2 * epsilon
        near = np.exp(np.where(far | closed, -np.inf, scores) - best)
        chosen = free.argmax(axis=-1)[:, None]
        weights.append(np.take_along_axis(near / near.sum(-1, keepdims=True), chosen, axis=-1))
        experts.append(chosen)
        closed = closed | (np.arange(scores.shape[-1]) == chosen)
    return np.concatenate(experts, axis=-1), np.concatenate(weights, axis=-1)


@pytest.mark.parametrize("epsilon", [0.01, 0.2, 1.0])
def test_sparsemixer_without_a_key(epsilon):
    routing = moejax.sparsemixer(LOGITS, epsilon=epsilon)
    experts, weights = phimoe(np.asarray(LOGITS), epsilon)
    same(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)


def test_sparsemixer_draws_as_often_as_the_softmax_says():
    logits = np.tile(np.float32([1.0, 0.9, 0.2]), (20_000, 1))
    routing = moejax.sparsemixer(logits, epsilon=10.0, key=jax.random.key(0))
    first, weights = np.asarray(routing.experts)[:, 0], np.asarray(routing.weights)[:, 0]
    softmax = np_softmax(logits[0])
    np.testing.assert_allclose(np.bincount(first) / len(first), softmax, atol=0.01)
    # A draw that is not the best keeps its weight once in four times, or a third of it.
    others, ratio = first != 0, weights / softmax[first]
    np.testing.assert_allclose(ratio[~others], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[others], np.where(ratio[others] > 2 / 3, 1, 1 / 3), rtol=1e-5)
    np.testing.assert_allclose(ratio[others].mean(), 0.25 + 0.75 / 3, atol=0.02)
    second = np.asarray(routing.experts)[~others, 1]
    assert set(second) == {1, 2}
    np.testing.assert_allclose(np.mean(second == 1), np_softmax(logits[0, 1:])[0], atol=0.02)


def test_the_gradient_of_sparsemixer_is_that_of_the_published_code():
    """Whatever the factor in the value, it is w (1[e chosen] - p_e) for each of the choices."""
    key, epsilon = jax.random.key(1), 10.0  # no expert is left out
    cotangent = np.asarray(normal(2, 64, 2))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_decision(logits):
        routing = moejax.sparsemixer(logits, epsilon=epsilon, key=key)
        return jnp.sum(cotangent * routing.weights), routing

    gradient, routing = gradient_and_decision(LOGITS)
    chosen = np.asarray(routing.experts)
    first, second = (chosen[:, i, None] == np.arange(8) for i in range(2))
    expected = 0
    for i, (choice, taken) in enumerate([(first, np.zeros_like(first)), (second, first)]):
        p = np_softmax(np.where(taken, -np.inf, LOGITS), axis=-1)
        weight = np.sum(p, axis=-1, keepdims=True, where=choice)
        expected += cotangent[:, i, None] * weight * (choice - p)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.less(routing.weights, 1).all()


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_sparsemixer_with_one_expert_left(key):
    logits = jnp.array([[-jnp.inf, 2.0, -jnp.inf]])

    def weights(logits):
        routing = moejax.sparsemixer(logits, epsilon=0.1, key=key)
        return routing.weights.sum(), routing

    gradient, routing = jax.jit(jax.grad(weights, has_aux=True))(logits)
    same(routing.experts, [[1, 3]])
    same(routing.weights, [[1.0, 0.0]])
    assert not np.isnan(gradient).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_is_the_textbook_loop(p):
    routing = moejax.top_p(LOGITS, p=p)
    scores, experts = np_softmax(LOGITS, axis=-1), np.asarray(routing.experts)
    for t, row in enumerate(scores):
        chosen, total = [], 0.0
        for e in np.argsort(-row):
            if chosen and total >= p - 1e-6:
                break
            chosen.append(e)
            total += row[e]
        np.testing.assert_array_equal(experts[t][experts[t] < 8], chosen)
    np.testing.assert_allclose(
        routing.weights, np.where(experts < 8, np.sort(scores)[:, ::-1], 0), rtol=1e-6
    )


def test_top_p_takes_no_more_than_k():
    routing = moejax.top_p(LOGITS, p=0.99, k=2)
    assert routing.experts.shape == (64, 2)
    assert bool(moejax.top_p(LOGITS, p=1e-9).counts.sum() == 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moejax.top_p(LOGITS, p=0.0), "above 0 and at most 1, got 0.0"),
        (lambda: moejax.top_p(LOGITS, p=1.5), "above 0 and at most 1, got 1.5"),
        (lambda: moejax.top_p(LOGITS, p=0.5, k=9), "`k` must be an integer"),
        (lambda: moejax.sparsemixer(LOGITS, epsilon=-1.0), "`epsilon` must be positive, got -1"),
        (lambda: moejax.sparsemixer(LOGITS[:, :1], epsilon=0.1), "sends a token to two experts"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_score_of_ones_own():
    routing = moejax.by_score(LOGITS, k=2, score=moejax.root_softplus, scale=1.5)
    scores = np.sqrt(np.log1p(np.exp(np.asarray(LOGITS))))
    best = np.sort(np.argsort(-scores, axis=-1)[:, :2], axis=-1)
    weights = np.take_along_axis(scores, best, axis=-1)
    np.testing.assert_array_equal(by_expert(routing)[0], best)
    expected = 1.5 * weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(by_expert(routing)[1], expected, rtol=1e-5)


COTANGENT = np.float32([[1.0, -3.0]])


@jax.jit
def weights_scores_and_gradient_of_sigmoids(logits):
    def total(logits):
        routing = moejax.by_score(logits, k=2, score=jax.nn.sigmoid)
        return jnp.sum(COTANGENT * routing.weights), (routing.weights, routing.scores)

    gradient, parts = jax.grad(total, has_aux=True)(logits)
    return parts, gradient


@pytest.mark.parametrize("least", [-20.0, -43.0, -45.0, -65.0])
def test_small_scores_are_normalised_with_their_gradient(least):
    """As small sigmoids are exponentials, these are the weights and the gradient of `top_k`."""
    logits = np.float32(least + np.array([[0.0, -1.0, -2.0]]))
    (weights, scores), gradient = weights_scores_and_gradient_of_sigmoids(logits)
    best = np_softmax(logits[0, :2])
    np.testing.assert_allclose(weights, [best], rtol=1e-4)
    slope = best * (COTANGENT[0] - best @ COTANGENT[0])
    np.testing.assert_allclose(gradient, [[*slope, 0]], rtol=1e-4)
    np.testing.assert_allclose(scores, np_softmax(logits, axis=-1), rtol=1e-4)


def test_weights_sum_to_the_scale_or_are_zero_and_the_gradient_is_finite():
    logits = np.float32(np.linspace(-110, 0, 2001)[:, None] - np.arange(3.0))

    def total(logits):
        routing = moejax.by_score(logits, k=2, score=jax.nn.sigmoid, scale=2.5)
        return 1e3 * jnp.sum(routing.weights[:, 0] - routing.scores[:, 1]), routing.weights

    gradient, weights = jax.jit(jax.grad(total, has_aux=True))(logits)
    normal = np.asarray(jax.nn.sigmoid(logits[:, 0]) >= jnp.finfo(jnp.float32).tiny)
    np.testing.assert_allclose(np.sum(weights, axis=-1), np.where(normal, 2.5, 0), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(8,), (64,), (1, 8), (64, 8), (1, 1), (64, 1, 1)])
def test_a_p_that_would_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match=r"scalar or one per token, \[64, 1\], got \["):
        moejax.top_p(LOGITS, p=jnp.full(shape, 0.5))


@pytest.mark.parametrize("p", [np.float32(0.5), jnp.float32(0.5), jnp.full((64, 1), 0.5)])
def test_p_may_be_an_array(p):
    experts = moejax.top_p(LOGITS, p=0.5).experts
    same(moejax.top_p(LOGITS, p=p).experts, experts)
    same(jax.jit(lambda p: moejax.top_p(LOGITS, p=p).experts)(p), experts)


@pytest.mark.parametrize("logits", [[-120.0, -110.0, -105.0], [18.0, 30.0, 40.0]])
def test_sigmoids_that_are_rounded_to_one_number_rank_by_their_logits(logits):
    assert moejax.sigmoid_top_k(jnp.array([logits]), k=2).experts.tolist() == [[2, 1]]
