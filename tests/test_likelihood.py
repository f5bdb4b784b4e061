"""The mixture likelihood against scipy, the posterior as its gradient, and competition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax

import moejax
from cases import params_of
from reference import check_gradients

T, O, E = 7, 3, 4  # noqa: E741
RNG = np.random.default_rng(0)
OUTPUTS, LOGITS = RNG.normal(size=(E, T, O)), RNG.normal(size=(T, E))
TARGETS, BITS = RNG.normal(size=(T, O)), RNG.integers(0, 2, (T, O))
CLASSES = RNG.integers(0, O, T)


def np_gaussian(e, t):
    return scipy.stats.norm.logpdf(TARGETS[t], OUTPUTS[e, t], np.sqrt(0.3)).sum()


def np_bernoulli(e, t):
    return scipy.stats.bernoulli.logpmf(BITS[t], 1 / (1 + np.exp(-OUTPUTS[e, t]))).sum()


def np_categorical(e, t):
    return np.log(np.exp(OUTPUTS[e, t, CLASSES[t]]) / np.exp(OUTPUTS[e, t]).sum())


@jax.jit
def gaussian(outputs):
    return moejax.gaussian_log_likelihood(
        outputs, jnp.asarray(TARGETS, outputs.dtype), variance=0.3
    )


@jax.jit
def bernoulli(outputs):
    return moejax.bernoulli_log_likelihood(outputs, jnp.asarray(BITS))


@jax.jit
def categorical(outputs):
    return moejax.categorical_log_likelihood(outputs, jnp.asarray(CLASSES))


FAMILIES = [(gaussian, np_gaussian), (bernoulli, np_bernoulli), (categorical, np_categorical)]


@pytest.mark.parametrize(("family", "reference"), FAMILIES)
def test_log_likelihoods_are_those_of_scipy(family, reference):
    expected = [[reference(e, t) for e in range(E)] for t in range(T)]
    np.testing.assert_allclose(family(np.float32(OUTPUTS)), expected, rtol=2e-5)


def test_variance_may_be_learned_and_differ_between_experts(x64):
    means, targets = jnp.asarray(OUTPUTS), jnp.asarray(TARGETS)
    log_p = jax.jit(lambda v: moejax.gaussian_log_likelihood(means, targets, variance=v))
    known = partial(moejax.gaussian_log_likelihood, means, targets)  # where it is known
    np.testing.assert_allclose(log_p(np.float32(0.3)), known(variance=0.3), 1e-6)
    each = np.arange(1.0, E + 1)
    expected = [np.asarray(known(variance=e + 1.0))[:, e] for e in range(E)]
    np.testing.assert_allclose(log_p(each[:, None, None]), np.transpose(expected), rtol=1e-12)
    check_gradients(log_p, each[:, None, None])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integer_targets_are_read_in_the_dtype_of_the_means(dtype):
    means, targets = np.zeros((2, 3, 1), dtype), np.arange(3)[:, None]
    likelihood = jax.jit(moejax.gaussian_log_likelihood)
    log_p = likelihood(means, targets)
    assert log_p.dtype == jnp.float32
    np.testing.assert_array_equal(log_p, likelihood(means, targets.astype(np.float32)))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), np.float32(0), jnp.ones((2, 1, 1, 1))])
def test_variance_must_be_positive_and_fit_the_means(value):
    with pytest.raises(ValueError, match="`variance` must be positive"):
        moejax.gaussian_log_likelihood(jnp.zeros((2, 3, 1)), jnp.zeros((3, 1)), variance=value)


@pytest.mark.parametrize("family", [gaussian, bernoulli, categorical])
def test_gradients_in_float64(family, x64):
    def nll(logits, outputs):
        return moejax.mixture_nll(jax.nn.log_softmax(logits), family(outputs))

    check_gradients(nll, LOGITS, OUTPUTS)


def test_gradient_is_the_posterior():
    """-dL/dlog p_e = h_e = g_e p_e / sum g p: an expert learns as far as it is responsible."""
    log_gates, log_p = np.float32(log_softmax(LOGITS, axis=1)), gaussian(np.float32(OUTPUTS))
    joint = np.exp(np.asarray(log_gates, np.float64) + np.asarray(log_p, np.float64))
    posterior = joint / joint.sum(axis=1, keepdims=True)
    gradient = jax.jit(jax.grad(moejax.mixture_nll, argnums=1))(log_gates, log_p)
    np.testing.assert_allclose(gradient, -posterior / T, rtol=1e-4, atol=1e-7)


def test_experts_compete_where_the_blend_makes_them_cooperate():
    """Expert 0 is right, expert 1 is wrong: only the error of the blend drags both along."""
    means = np.array([[[1.0]], [[-3.0]]], np.float32)
    gates, target = np.array([[0.5, 0.5]], np.float32), np.array([[1.0]], np.float32)

    def likelihood(means):
        return moejax.mixture_nll(jnp.log(gates), moejax.gaussian_log_likelihood(means, target))

    def blend(means):
        return jnp.sum((jnp.einsum("te,eto->to", gates, means) - target) ** 2)

    gradients = jax.jit(lambda means: (jax.grad(likelihood)(means), jax.grad(blend)(means)))
    competing, cooperating = jax.device_get(gradients(means))
    assert np.abs(competing).max() < 2e-3  # the gate leaves the wrong expert alone
    assert np.abs(cooperating).min() > 1  # even the right expert is pushed away


def test_padding_enters_neither_sum_nor_count():
    log_gates, log_p = np.float32(log_softmax(LOGITS, axis=1)), bernoulli(np.float32(OUTPUTS))
    nll = jax.jit(moejax.mixture_nll)
    np.testing.assert_allclose(
        nll(log_gates, log_p, mask=np.arange(T) < 5),
        nll(log_gates[:5], np.asarray(log_p)[:5]),
        rtol=1e-6,
    )


@jax.jit
def gradients_of_the_first(log_gates, log_p):
    """Those of the likelihood of two tokens of which the second is padding."""
    nll = partial(moejax.mixture_nll, mask=np.array([True, False]))
    return jax.grad(nll, argnums=(0, 1))(log_gates, log_p)


@pytest.mark.parametrize("row", [[-jnp.inf, -jnp.inf], [jnp.nan, 0.0], [jnp.inf, 0.0]])
def test_padding_that_is_not_finite_changes_no_gradient(row):
    """Not even where every expert gives it probability zero."""
    clean = np.array([[-1, -2], [0, 0]], np.float32)
    broken = np.array([clean[0], row], np.float32)
    expected = gradients_of_the_first(clean, clean)
    for arguments in ((broken, clean), (clean, broken), (broken, broken)):
        found = gradients_of_the_first(*arguments)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_padding_that_overflows_leaves_the_parameters_alone():
    """A padded target so large that its likelihood is zero under every expert."""
    x, y = np.ones((2, 1), np.float32), np.array([[1.0], [1e30]], np.float32)
    experts, router = moejax.stack(moejax.linear(1, 1), 2), moejax.linear(1, 2)
    params = {"experts": params_of(experts), "router": params_of(router, seed=1)}

    def loss(params, targets):
        log_gates = jax.nn.log_softmax(router.apply(params["router"], x))
        log_p = moejax.gaussian_log_likelihood(experts.apply(params["experts"], x), targets)
        return moejax.mixture_nll(log_gates, log_p, mask=np.array([True, False]))

    gradient = jax.jit(jax.grad(loss))
    gradients, expected = gradient(params, y), gradient(params, np.float32([[1], [0]]))
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)


@jax.jit
def masked_nll_of_classes(logits, labels):
    """Of two tokens, value and gradient for a mask of the second; and the log-likelihoods."""

    def nll(logits):
        log_p = moejax.categorical_log_likelihood(logits, labels)
        mask = np.array([True, False])
        return moejax.mixture_nll(jnp.zeros_like(log_p), log_p, mask=mask), log_p

    (value, log_p), gradient = jax.value_and_grad(nll, has_aux=True)(logits)
    return (value, gradient), log_p


@pytest.mark.parametrize("label", [-1, -3, O])
def test_a_label_of_no_class_shows_unless_it_is_masked(label):
    logits = np.float32(OUTPUTS)[:, :2]
    found, log_p = masked_nll_of_classes(logits, np.array([1, label]))
    np.testing.assert_array_equal(np.isnan(log_p), [[False] * E, [True] * E])
    expected, _ = masked_nll_of_classes(logits, np.array([1, 0]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stable_where_probabilities_underflow():
    nll = jax.jit(jax.value_and_grad(moejax.mixture_nll, argnums=1))
    value, gradient = nll(np.float32([[-1e4, 0]]), np.float32([[0, -2e4]]))
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(gradient, [[-1, 0]])
    extreme = jax.jit(moejax.bernoulli_log_likelihood)(
        np.float32([[[1e4]], [[-1e4]]]), np.ones((1, 1), np.int32)
    )
    np.testing.assert_allclose(extreme, [[0, -1e4]])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="every target"):
        moejax.bernoulli_log_likelihood(jnp.zeros((E, T, 1)), jnp.zeros(T))
    with pytest.raises(ValueError, match="tokens, experts"):
        moejax.mixture_nll(jnp.zeros((T, E)), jnp.zeros((E, T)))
    with pytest.raises(ValueError, match="`mask` must be"):  # a column would broadcast
        moejax.mixture_nll(jnp.zeros((T, E)), jnp.zeros((T, E)), mask=jnp.ones((T, 1), bool))


def test_classes_of_several_targets_add_up():
    logits, labels = RNG.normal(size=(E, T, 2, O)), RNG.integers(0, O, (T, 2))
    likelihood = jax.jit(moejax.categorical_log_likelihood)
    parts = [np.asarray(likelihood(logits[:, :, s], labels[:, s])) for s in range(2)]
    np.testing.assert_allclose(likelihood(logits, labels), sum(parts), rtol=1e-6)


@pytest.mark.parametrize("mask", [None, np.ones(300, bool)])
def test_the_sum_over_tokens_does_not_overflow(mask):
    log_gates, log_p = np.zeros((300, 1), np.float16), np.full((300, 1), -300, np.float16)
    assert float(jax.jit(moejax.mixture_nll)(log_gates, log_p, mask=mask)) == 300


def test_no_tokens_have_no_likelihood():
    nothing = np.zeros((0, 3), np.float32)
    assert float(jax.jit(moejax.mixture_nll)(nothing, nothing)) == 0


def test_the_axis_of_classes_is_named():
    with pytest.raises(ValueError, match=r"\[experts, 6, classes\], got \[2, 5, 4\]"):
        moejax.categorical_log_likelihood(jnp.zeros((2, 5, 4)), jnp.zeros(6, jnp.int32))
