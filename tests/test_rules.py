"""Rules against the numbers of published systems, and against their definitions in NumPy."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax as np_softmax

import moejax
from cases import RULES, E, T, normal
from moejax.rules.noisy import choose_noisy
from reference import by_expert, golden

LOGITS = normal(3, 64, 8, scale=2)
# As one program each; eagerly every operation is one.
choose_noisy = jax.jit(choose_noisy, static_argnames="k")
update_balance_bias = jax.jit(moejax.update_balance_bias)
update_l1_coefficient = jax.jit(moejax.update_l1_coefficient, static_argnames="k")


def assert_choices(routing, experts, weights, rtol=1e-6):
    np.testing.assert_array_equal(by_expert(routing)[0], experts)
    np.testing.assert_allclose(by_expert(routing)[1], weights, rtol=rtol)


def test_top_2_is_that_of_mixtral():
    peer = golden("mixtral")
    routing = moejax.top_k(jnp.asarray(peer["logits"]), k=2)
    assert_choices(routing, peer["indices"], peer["weights"])


def test_raw_top_2_is_that_of_vmoe():
    peer = golden("vmoe_top_2_capacity_4")
    routing = moejax.top_k(jnp.asarray(peer["logits"]), k=2, renormalize=False)
    gates = np_softmax(peer["logits"], axis=-1)
    best = np.sort(np.argsort(-gates, axis=-1)[:, :2], axis=-1)
    assert_choices(routing, best, np.take_along_axis(gates, best, axis=-1))


def test_sigmoid_with_bias_and_groups_is_that_of_deepseek():
    peer = golden("deepseek_v3")
    route = partial(moejax.sigmoid_top_k, k=2, num_groups=4, kept_groups=2, scale=2.5)
    routing = route(jnp.asarray(peer["logits"]), jnp.asarray(peer["bias"]))
    assert_choices(routing, peer["indices"], peer["weights"])


def test_noisy_top_2_is_that_of_shazeer():
    peer = golden("shazeer_noisy_top_2")
    clean, noise, scale = (peer[name] for name in ("logits", "noise", "noise_std"))
    routing = choose_noisy(clean, clean + noise * scale, scale, k=2)
    gates = np.zeros_like(peer["gates"])
    np.put_along_axis(gates, np.asarray(routing.experts), np.asarray(routing.weights), axis=-1)
    np.testing.assert_allclose(gates, peer["gates"], rtol=2e-6)
    np.testing.assert_allclose(np.sum(routing.chances, axis=0), peer["load"], rtol=2e-6)


def test_noise_has_the_scale_it_is_given():
    clean = np.zeros((4096, 4), np.float32)
    routing = moejax.noisy_top_k(clean, 0.5, k=4, key=jax.random.key(0))
    noise = np.log(routing.scores)
    noise = noise - noise.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.sqrt(np.sum(noise**2) / (4096 * 3)), 0.5, rtol=0.02)


def test_chances_are_frequencies_under_fresh_noise():
    clean, scale, k = np.asarray(LOGITS[:1]), jnp.float32(1), 3
    noisy = clean + np.asarray(normal(1, 1, 8))
    [chances] = np.asarray(choose_noisy(clean, noisy, scale, k=k).chances)
    fresh = clean + np.asarray(normal(2, 20_000, 8))
    for e in range(8):
        others = np.sort(np.delete(noisy, e))[-k]  # the k-th best of the others
        np.testing.assert_allclose(chances[e], np.mean(fresh[:, e] > others), atol=0.015)


def test_second_choice_is_kept_as_often_as_its_weight_says():
    logits = np.float32(np.tile(np.log([0.5, 0.05, 0.0001]), (20_000, 1)))
    routing = moejax.gshard_top_2(logits, key=jax.random.key(0))
    second = 0.05 / 0.55
    experts, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    np.testing.assert_allclose(np.mean(experts[:, 1] == 1), second / 0.2, atol=0.01)
    np.testing.assert_allclose(weights[:, 0], 1 - second, rtol=1e-6)
    left_out = experts[:, 1] == 3
    np.testing.assert_array_equal(weights[:, 1] == 0, left_out)
    np.testing.assert_allclose(weights[~left_out, 1], second, rtol=1e-6)


def test_threshold_may_be_traced():
    rule = partial(moejax.gshard_top_2, LOGITS, key=jax.random.key(0))
    traced = jax.jit(lambda threshold: rule(threshold=threshold))(0.3)
    np.testing.assert_array_equal(traced.experts, rule(threshold=0.3).experts)


def test_likely_second_choice_is_always_kept():
    routing = moejax.gshard_top_2(np.zeros((500, 3), np.float32), key=jax.random.key(0))
    assert np.less(routing.experts, 3).all()


@pytest.mark.parametrize("rule", ["top_2", "gshard_top_2", "noisy_top_2_without_key"])
def test_evaluation_is_deterministic(rule):
    routes = {
        "top_2": partial(moejax.top_k, k=2),
        "gshard_top_2": moejax.gshard_top_2,
        "noisy_top_2_without_key": partial(moejax.noisy_top_k, noise_scale=1.0, k=2),
    }
    decision, plain = routes[rule](LOGITS), moejax.top_k(LOGITS, k=2)
    np.testing.assert_array_equal(decision.experts, plain.experts)
    np.testing.assert_array_equal(decision.weights, plain.weights)


def test_bias_update_is_that_of_deepseek():
    experts = jax.device_put(np.repeat(np.arange(4, dtype=np.int32), [5, 4, 3, 4])[:, None])
    scores = np.zeros((16, 4), np.float32)
    routing = moejax.Routing(experts, np.ones((16, 1), np.float32), scores, scores)
    bias = update_balance_bias(np.zeros(4, np.float32), routing, rate=0.01)
    np.testing.assert_allclose(bias, [-0.01, 0, 0.01, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32, jnp.float32])
def test_bias_update_takes_counts_that_are_large(dtype):
    """The product of E and a count, and the sum of all, are larger than an int32 can hold."""
    popular = np.where(np.arange(256) == 3, 12_000_000, 10_000).astype(dtype)
    bias = update_balance_bias(np.zeros(256, np.float32), popular, rate=0.5)
    np.testing.assert_array_equal(bias, np.where(np.arange(256) == 3, -0.5, 0.5))
    largest = np.full(256, 2**31 - 128, dtype)  # a float32, too
    np.testing.assert_array_equal(update_balance_bias(bias, largest, rate=0.5), bias)
    one_less = np.where(np.arange(256) == 7, 2**31 - 256, 2**31 - 128).astype(dtype)
    if dtype != jnp.float32:
        bias = update_balance_bias(np.zeros(256, np.float32), one_less, rate=0.5)
        np.testing.assert_array_equal(bias, np.where(np.arange(256) == 7, 0.5, -0.5))


@pytest.mark.parametrize("seed", range(3))
def test_bias_update_is_exact(seed):
    counts = np.random.default_rng(seed).integers(2, 5, 7)
    expected = np.sign(counts.sum() - 7 * counts)
    bias = update_balance_bias(np.zeros(7, np.float32), counts, rate=1.0)
    np.testing.assert_array_equal(bias, expected)


def test_bias_update_of_several_decisions_and_layers():
    rule = partial(moejax.sigmoid_top_k, k=2)
    halves = [rule(jax.device_put(half)) for half in np.split(np.asarray(LOGITS), 2)]
    update, zeros = partial(update_balance_bias, rate=0.1), np.zeros(8, np.float32)
    once = update(zeros, rule(LOGITS))
    counts = np.sum([half.counts for half in halves], axis=0)
    np.testing.assert_array_equal(update(zeros, counts), once)
    layers = np.stack([half.counts for half in halves])
    each = jax.vmap(update)(np.zeros((2, 8), np.float32), layers)
    for row, half in zip(np.asarray(each), halves, strict=True):
        np.testing.assert_array_equal(row, update(zeros, half))
    with pytest.raises(ValueError, match=r"one number per expert, \[E\], got \[2, 8\]"):
        update(zeros, layers)


@pytest.mark.parametrize("shape", [(), (1,), (4, 8)])
def test_bias_update_does_not_broadcast(shape):
    with pytest.raises(ValueError, match="one number per expert"):
        moejax.update_balance_bias(jnp.zeros(shape), moejax.switch(LOGITS), rate=0.1)


def test_bias_balances_what_logits_do_not():
    logits = LOGITS + np.float32([np.arange(8) / 2])  # everybody wants the last

    def step(bias, _):
        routing = moejax.sigmoid_top_k(logits, bias, k=2)
        return moejax.update_balance_bias(bias, routing, rate=0.001), routing.counts

    counts = np.asarray(jax.lax.scan(step, np.zeros(8, np.float32), length=500)[1])
    assert counts[0].max() >= 32
    assert 15 <= counts[-1].min() <= counts[-1].max() <= 17  # 16 each is perfect


def test_bias_gets_no_gradient():
    weights = lambda bias: moejax.sigmoid_top_k(LOGITS, bias, k=2).weights.sum()  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(weights))(np.ones(8, np.float32)), 0)


def test_relu_matches_its_definition():
    routing = moejax.relu(LOGITS)
    gates = routing.gates
    np.testing.assert_array_equal(gates, np.maximum(np.asarray(LOGITS), 0))
    np.testing.assert_array_equal(routing.chosen, np.asarray(LOGITS) > 0)


def test_relu_keeps_a_token_without_positive_logit_apart_from_padding():
    routing = moejax.relu(jnp.array([[-2.0, -1.0, -3.0]]))
    np.testing.assert_array_equal(routing.experts, [[3, 1, 3]])
    np.testing.assert_array_equal(routing.weights, 0)
    assert routing.present.tolist() == [True]


@pytest.mark.parametrize(("k", "expected"), [(1, 1.2), (2, 1.0), (3, 1 / 1.2)])
def test_sparsity_controller(k, expected):
    routing = moejax.relu(jnp.array([[1.0, 2.0, -1.0, -1.0], [3.0, 0.0, 2.0, -1.0]]))
    coefficient = update_l1_coefficient(jnp.float32(1.0), routing, k=k)
    np.testing.assert_allclose(coefficient, expected, rtol=1e-6)


def test_sparsity_controller_counts_neither_padding_nor_idle_choices():
    routing = moejax.relu(jnp.array([[1.0, 2.0, -1.0], [-1.0, -2.0, -3.0], [5.0, 6.0, 7.0]]))

    def coefficient(*mask):
        kept = jax.jit(moejax.mask_tokens)(routing, np.array(mask))
        return update_l1_coefficient(np.float32(1), kept, k=1)

    assert coefficient(True, True, False) == 1
    assert coefficient(False, True, False) < 1


@pytest.mark.parametrize("start", [1e-8, 1, np.float32(1e-8)])
def test_sparsity_controller_may_start_from_a_number(start):
    update = partial(moejax.update_l1_coefficient, routing=moejax.relu(LOGITS), k=1)
    np.testing.assert_array_equal(update(start), update(jnp.float32(start)))
    assert update(start).dtype == jnp.float32
    assert update(jnp.bfloat16(start)).dtype == jnp.bfloat16


def test_hash_looks_up():
    table = jnp.array([3, 1, 0, 2])
    ids = jnp.array([0, 0, 3, 2, 9])
    routing = moejax.hashed(np.zeros((5, 4), np.float32), token_ids=ids, table=table)
    np.testing.assert_array_equal(np.ravel(routing.experts), [3, 3, 2, 0, 4])  # 9 is unknown
    np.testing.assert_array_equal(np.ravel(routing.weights), [1, 1, 1, 1, 0])


@pytest.mark.parametrize("table", [[0, -1, 4, 300], [-(2**31), 0, 2**31 - 1, 0]])
def test_hash_sends_what_is_outside_nowhere(table):
    """Negative ids and entries included, which as an index would count from the end."""
    ids = jnp.array([-1, -5, 0, 1, 2, 3, 4])
    routing = moejax.hashed(np.zeros((7, 4), np.float32), token_ids=ids, table=jnp.array(table))
    padded = [4, 4, *table, 4]
    expected = [e if 0 <= e < 4 else 4 for e in padded]
    np.testing.assert_array_equal(np.ravel(routing.experts), expected)
    np.testing.assert_array_equal(np.ravel(routing.weights), np.less(expected, 4))
    np.testing.assert_array_equal(np.sum(routing.scores, axis=-1), np.less(expected, 4))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_hash_takes_ids_narrower_than_the_table(dtype):
    ids, table = jnp.array([1, 100], dtype), jnp.arange(300) % 4
    routing = moejax.hashed(np.zeros((2, 4), np.float32), token_ids=ids, table=table)
    np.testing.assert_array_equal(np.ravel(routing.experts), [1, 0])


@pytest.mark.parametrize("num_experts", [4, 100])  # compared, and scattered
def test_a_negative_expert_is_nowhere(num_experts):
    scores, weights = np.zeros((2, num_experts), np.float32), np.ones((2, 1), np.float32)
    routing = moejax.Routing(jnp.array([[-1], [1]]), weights, scores, scores)
    np.testing.assert_array_equal(routing.counts, np.eye(num_experts)[1])


def sinkhorn_plan(logits, iterations):
    """The textbook loop: scale columns, scale rows, on the exponentials themselves."""
    plan = np.exp(np.asarray(logits, np.float64))
    for _ in range(iterations):
        plan /= plan.sum(axis=1, keepdims=True)
        plan /= plan.sum(axis=0, keepdims=True)
    return plan / plan.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_is_the_textbook_loop(k):
    routing = moejax.sinkhorn(LOGITS, k=k, iterations=20)
    expected = np.sort(np.argsort(-sinkhorn_plan(LOGITS, 20), axis=-1)[:, :k], axis=-1)
    scores = np_softmax(np.asarray(LOGITS), axis=-1)
    assert_choices(routing, expected, np.take_along_axis(scores, expected, axis=-1), rtol=1e-5)


def test_sinkhorn_scales_twenty_times_by_default():
    assert inspect.signature(moejax.sinkhorn).parameters["iterations"].default == 20


def test_sinkhorn_balances():
    logits = LOGITS + np.float32([np.arange(8)])
    assert int(moejax.switch(logits).counts.max()) >= 30
    assert int(moejax.sinkhorn(logits).counts.max()) <= 16  # 8 each is perfect


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_without_an_expert_is_that_of_the_others(k):
    """The plan is the one of the columns that are left, and tokens that go nowhere do not count."""
    left = np.array([0, 2, 3, 4, 5, 6, 7])
    logits = np.where(np.arange(8) == 1, np.float32(-np.inf), LOGITS)
    routing = moejax.sinkhorn(jax.device_put(logits), k=k)
    alone = moejax.sinkhorn(jax.device_put(logits[:, left]), k=k)
    np.testing.assert_array_equal(routing.experts, left[np.asarray(alone.experts)])
    assert np.isfinite(routing.weights).all()
    others = np.arange(len(logits)) != 5
    alone = moejax.sinkhorn(jax.device_put(logits[others]), k=k)
    logits[5] = -np.inf
    again = moejax.sinkhorn(jax.device_put(logits), k=k)
    np.testing.assert_array_equal(np.asarray(again.experts)[others], alone.experts)


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"hashed"}))
def test_no_tokens_make_an_empty_decision(rule):
    @jax.jit
    def decision_and_counts(logits):
        routing = RULES[rule](logits)
        return routing, routing.counts

    routing, counts = decision_and_counts(np.zeros((0, E), np.float32))
    assert routing.scores.shape == (0, E)
    assert routing.experts.shape == routing.weights.shape
    np.testing.assert_array_equal(counts, np.zeros(E))


REFUSED = [
    (partial(moejax.top_k, k=1), "zero gradient"),
    (partial(moejax.top_k, k=9), "between 1 and"),
    (partial(moejax.top_k, k=2.5), "`k` must be an integer"),
    (partial(moejax.noisy_top_k, noise_scale=1.0, k=1), "zero gradient"),
    (partial(moejax.noisy_top_k, noise_scale=jnp.ones((1, 64, 8)), k=2), "`noise_scale` must be"),
    (partial(moejax.noisy_top_k, noise_scale=-1.0, k=2), "`noise_scale` must be"),
    (partial(moejax.noisy_top_k, noise_scale=np.float32(-1), k=2), "`noise_scale` must be"),
    (partial(moejax.sigmoid_top_k, k=1), "zero gradient"),
    (partial(moejax.sigmoid_top_k, k=2, num_groups=3), "divide"),
    (partial(moejax.sigmoid_top_k, k=3, num_groups=4, kept_groups=1), "leave at least"),
    (partial(moejax.sigmoid_top_k, jnp.zeros((64, 8)), jnp.zeros(7), k=2), "one number per"),
    (partial(moejax.gshard_top_2, threshold=0.0), "positive"),
    (partial(moejax.gshard_top_2, threshold=float("nan")), "positive"),
    (partial(moejax.sinkhorn, k=0), "between 1 and"),
    (partial(moejax.sinkhorn, iterations=0), "`iterations` must be an integer"),
    # A column would broadcast against the tokens.
    (partial(moejax.sinkhorn, mask=jnp.ones((64, 1), bool)), "`mask` must be"),
    (lambda logits: moejax.mask_tokens(moejax.switch(logits), jnp.ones((64, 1), bool)), "`mask`"),
    (lambda logits: moejax.mask_tokens(moejax.switch(logits), jnp.ones(64)), "`mask` must be"),
    (partial(moejax.hashed, token_ids=jnp.zeros(3, int), table=jnp.zeros(4, int)), "token_ids"),
]


@pytest.mark.parametrize(("rule", "message"), REFUSED)
def test_useless_requests_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        rule() if getattr(rule, "args", ()) else rule(LOGITS)


COUNTS = {
    "top_k": partial(moejax.top_k, LOGITS),
    "noisy_top_k": partial(moejax.noisy_top_k, LOGITS, noise_scale=1.0),
    "sigmoid_top_k": partial(moejax.sigmoid_top_k, LOGITS),
    "by_score": partial(moejax.by_score, LOGITS),
    "sinkhorn": partial(moejax.sinkhorn, LOGITS),
    "top_p": partial(moejax.top_p, LOGITS, p=0.5),
    "expert_choice": partial(moejax.expert_choice, LOGITS),
}


@pytest.mark.parametrize("count", [jnp.int32(2), np.array(2), [2]])
@pytest.mark.parametrize("rule", COUNTS)
def test_a_count_that_is_an_array_is_refused_by_name(rule, count):
    name = "capacity" if rule == "expert_choice" else "k"
    with pytest.raises(ValueError, match=f"`{name}` must be an integer.*got .*2"):
        COUNTS[rule](**{name: count})


@pytest.mark.parametrize("rule", RULES)
def test_logits_must_be_tokens_by_experts(rule):
    with pytest.raises(ValueError, match="float array of shape"):
        RULES[rule](jnp.zeros((2, T, E)))
    with pytest.raises(ValueError, match="float array of shape"):
        RULES[rule](jnp.zeros((T, E), jnp.int32))


def test_a_decision_whose_second_choices_were_left_out_is_not_dense():
    """An expert that overflows on a token that did not choose it must not be run on it."""
    logits = jnp.array([[9.0, 0.0], [0.0, 9.0]] * 4)
    x = jnp.array([[1.0], [1000.0]] * 4)
    power = moejax.Layer(lambda key: jnp.ones(1), lambda params, x: jnp.exp(params[None] * x))
    model = moejax.moe(
        power,
        moejax.Layer(lambda key: (), lambda params, x: logits),
        num_experts=2,
        route=moejax.gshard_top_2,
    )
    params = {"router": (), "experts": jnp.array([[1.0], [0.001]])}
    y, routing = model.apply(params, x, key=jax.random.key(0))
    assert type(routing) is moejax.Routing
    assert not np.all(routing.chosen, axis=-1).any()
    assert np.isfinite(y).all()
    assert type(moejax.gshard_top_2(logits)) is moejax.DenseRouting


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_sparsity_controller_may_start_from_an_array_of_integers(dtype):
    update = partial(update_l1_coefficient, routing=moejax.relu(LOGITS), k=0)
    coefficient = update(jnp.asarray(1, dtype))
    np.testing.assert_array_equal(coefficient, jnp.float32(1.2))
    assert coefficient.dtype == jnp.float32


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (moejax.gshard_top_2, "gshard_top_2"),
        (partial(moejax.sparsemixer, epsilon=0.1), "sparsemix"),
    ],
)
def test_a_rule_of_two_experts_needs_two(rule, name):
    with pytest.raises(ValueError, match=f"`{name}.*` sends a token to two experts"):
        rule(jnp.zeros((3, 1)))


def test_noisy_top_k_of_one_names_itself():
    with pytest.raises(ValueError, match=r"`noisy_top_k\(k=1\)` gives every token"):
        moejax.noisy_top_k(LOGITS, 0.1, k=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_bias_is_refused(dtype):
    with pytest.raises(ValueError, match="`bias` must be float32 or wider"):
        moejax.update_balance_bias(jnp.zeros(4, dtype), jnp.arange(4), rate=1e-3)
