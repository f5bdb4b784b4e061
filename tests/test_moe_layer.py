"""The composed layer: shapes, masks, keys, transformations and errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import EXPERTS, RULES, D, E, O, T, unit

close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def model(rule="top_2", **options):
    return moejax.moe(
        EXPERTS["mlp"], moejax.linear(D, E), num_experts=E, route=RULES[rule], **options
    )


def tokens(*shape):
    return jax.random.normal(jax.random.key(3), shape)


def test_leading_axes_are_tokens(key):
    params = model().init(key)
    x = tokens(2, 3, D)
    y, routing = model().apply(params, x)
    flat, _ = model().apply(params, x.reshape(6, D))
    assert y.shape == (2, 3, O)
    assert routing.experts.shape == (6, 2)
    np.testing.assert_array_equal(y.reshape(6, O), flat)


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_a_masked_token_goes_nowhere_and_changes_nothing(rule, key):
    layer = model(rule)
    params = layer.init(key)
    x = tokens(T, D)
    mask = jnp.arange(T) % 3 != 1
    x = jnp.where(mask[:, None], x, jnp.nan)  # padding may hold anything
    y, routing = layer.apply(params, x, mask=mask)
    kept, kept_routing = layer.apply(params, x[np.asarray(mask)])
    close(y[np.asarray(mask)], kept)
    assert not y[~np.asarray(mask)].any()
    assert (routing.experts[~np.asarray(mask)] == E).all()
    assert not routing.weights[~np.asarray(mask)].any()
    for loss in (moejax.load_balancing_loss, moejax.importance_loss, moejax.router_z_loss):
        close(loss(routing), loss(kept_routing))


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_gradient_with_nan_padding_is_finite(rule, key):
    layer = model(rule)
    mask = jnp.arange(T) < 4
    x = jnp.where(mask[:, None], tokens(T, D), jnp.nan)

    def loss(params):
        y, routing = layer.apply(params, x, mask=mask)
        return (y**2).sum() + moejax.load_balancing_loss(routing) + moejax.router_z_loss(routing)

    gradients = jax.grad(loss)(layer.init(key))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_all_tokens_masked(key):
    y, routing = model().apply(model().init(key), tokens(T, D), mask=jnp.zeros(T, bool))
    assert not y.any()
    assert moejax.load_balancing_loss(routing) == 0
    assert moejax.router_z_loss(routing) == 0


def test_no_key_no_noise(key):
    noisy = moejax.noisy(moejax.linear(D, E), moejax.linear(D, E))
    layer = moejax.moe(EXPERTS["mlp"], noisy, num_experts=E, route=partial(moejax.noisy_top_k, k=2))
    params = layer.init(key)
    x = tokens(T, D)
    still = layer.apply(params, x)[1]
    np.testing.assert_array_equal(still.weights, layer.apply(params, x)[1].weights)
    one, two = (layer.apply(params, x, key=jax.random.key(i))[1] for i in (0, 1))
    assert not jnp.array_equal(one.scores, two.scores)
    np.testing.assert_array_equal(one.logits, still.logits)


def test_a_token_of_several_axes(key):
    router = moejax.linear(4, E)
    layer = moejax.moe(
        moejax.Layer(EXPERTS["mlp"].init, lambda p, x: EXPERTS["mlp"].apply(p, x.mean(axis=1))),
        moejax.Layer(router.init, lambda p, x: router.apply(p, x[:, 0])),
        num_experts=E,
        route=RULES["top_2"],
        feature_ndim=2,
    )
    y, routing = layer.apply(layer.init(key), tokens(2, 5, 3, D))
    assert y.shape == (2, 5, O)
    assert routing.weights.shape == (10, 2)


def test_mixture_of_mixtures(key):
    inner = moejax.moe(moejax.linear(D, O), moejax.linear(D, 3), num_experts=3)
    outer = moejax.moe(
        moejax.Layer(inner.init, lambda params, x: inner.apply(params, x)[0]),
        moejax.linear(D, E),
        num_experts=E,
        route=RULES["top_2"],
    )
    params = outer.init(key)
    x = tokens(T, D)
    y, routing = jax.jit(outer.apply)(params, x)
    expected = np.zeros((T, O))
    for t in range(T):
        for e, weight in zip(routing.experts[t], routing.weights[t], strict=True):
            own = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
            expected[t] += weight * inner.apply(own, x[t : t + 1])[0][0]
    close(y, expected)


def test_vmap_over_seeds(key):
    layer = model()
    keys = jax.random.split(key, 3)
    params = jax.vmap(layer.init)(keys)
    x = tokens(T, D)
    y, _ = jax.vmap(layer.apply, in_axes=(0, None))(params, x)
    for i in range(3):
        close(y[i], layer.apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)[0])


def test_scan_over_layers(key):
    layer = moejax.moe(moejax.glu(D, 5), moejax.linear(D, E), num_experts=E, route=RULES["top_2"])
    params = jax.vmap(layer.init)(jax.random.split(key, 3))

    def body(x, own):
        y, routing = layer.apply(own, x)
        return x + y, moejax.load_balancing_loss(routing)

    x, losses = jax.lax.scan(body, tokens(T, D), params)
    expected = tokens(T, D)
    for i in range(3):
        expected += layer.apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), expected)[0]
    close(x, expected)
    assert losses.shape == (3,)  # one loss per layer


def test_compiles_once(key):
    params = model().init(key)
    apply = jax.jit(model().apply)
    apply(params, tokens(T, D))
    other = tokens(T, D) + 1
    with jax.no_tracing():
        apply(params, other)


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
@pytest.mark.parametrize("shape", [(1, D), (0, D), (2, 1, D)])
def test_few_tokens(rule, shape, key):
    y, _ = model(rule).apply(model(rule).init(key), tokens(*shape))
    assert y.shape == (*shape[:-1], O)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_extreme_logits(rule, scale, key):
    layer = moejax.moe(
        EXPERTS["mlp"],
        moejax.Layer(lambda key: (), lambda p, x: scale * jnp.eye(E)[jnp.arange(len(x)) % E]),
        num_experts=E,
        route=RULES[rule],
    )
    params = layer.init(key)
    (y, _), gradients = jax.value_and_grad(
        lambda p: (layer.apply(p, tokens(T, D))[0].sum(), 0.0), has_aux=True
    )(params)
    assert jnp.isfinite(y)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_a_nan_token_stays_alone(rule, key):
    layer = model(rule)
    params = layer.init(key)
    x = tokens(T, D)
    y, _ = layer.apply(params, x.at[2].set(jnp.nan))
    expected, _ = layer.apply(params, x)
    others = np.arange(T) != 2
    close(y[others], expected[others])
    assert jnp.isnan(y[2]).all()


def test_all_tokens_on_one_expert_and_the_others_empty(key):
    one = moejax.Layer(lambda key: (), lambda p, x: jnp.tile(10.0 * jnp.eye(E)[1], (len(x), 1)))
    layer = moejax.moe(EXPERTS["mlp"], one, num_experts=E, route=moejax.switch)
    params = layer.init(key)
    x = tokens(T, D)
    y, routing = layer.apply(params, x)
    own = jax.tree.map(lambda leaf: leaf[1], params["experts"])
    close(y, routing.weights * EXPERTS["mlp"].apply(own, x))
    gradients = jax.grad(lambda p: layer.apply(p, x)[0].sum())(params)["experts"]
    empty = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[np.array([0, 2, 3])], gradients))
    assert not any(leaf.any() for leaf in empty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: model().apply(p, tokens(D)), "at least one axis of tokens"),
        (lambda p: model().apply(p, tokens(T, D), mask=jnp.ones(2, bool)), "`mask` must be"),
        (lambda p: model().apply(p, tokens(T, D), mask=jnp.ones(T)), "`mask` must be"),
        (
            lambda p: moejax.moe(EXPERTS["mlp"], moejax.linear(D, E), num_experts=E + 1).apply(
                p | {"experts": moejax.stack(EXPERTS["mlp"], E + 1).init(jax.random.key(0))},
                tokens(T, D),
            ),
            f"must return one logit per token and expert, \\[{T}, 5\\], got \\[{T}, 4\\]",
        ),
    ],
)
def test_errors(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(model().init(key))


@pytest.mark.parametrize("stacked", [E - 1, E + 1])
@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_parameters_of_another_number_of_experts_are_refused(rule, stacked, key):
    params = model().init(key) | {"experts": moejax.stack(EXPERTS["mlp"], stacked).init(key)}
    with pytest.raises(ValueError, match=f"`num_experts` \\({E}\\), got .*{stacked}"):
        model(rule).apply(params, tokens(1, D))


def test_forward_mode_is_that_of_dense(key):
    """As the docstring says: reverse mode everywhere, forward mode by `dense`."""
    params = model().init(key)["router"]
    experts = model().init(key)["experts"]

    def loss(layer, router):
        return (layer.apply({"router": router, "experts": experts}, tokens(2, D))[0] ** 2).sum()

    with pytest.raises(TypeError, match="forward-mode"):
        jax.hessian(partial(loss, model()))(params)
    forward = jax.jit(jax.hessian(partial(loss, model(execute=moejax.dense))))(params)
    backward = jax.jit(jax.jacrev(jax.jacrev(partial(loss, model()))))(params)
    jax.tree.map(partial(close, rtol=1e-4, atol=1e-5), forward, backward)


@pytest.mark.parametrize("execute", [moejax.dense, moejax.dropless])
def test_functions_with_bare_keywords_are_given_none(execute, key):
    def expert(params, x, **unknown):
        assert not unknown
        return x @ params

    def route(logits, **unknown):
        assert not unknown
        return moejax.top_k(logits, k=2)

    layer = moejax.moe(
        moejax.Layer(lambda key: jax.random.normal(key, (D, O)), expert),
        moejax.linear(D, E),
        num_experts=E,
        route=route,
        execute=execute,
    )
    y, _ = layer.apply(layer.init(key), tokens(T, D), key=key, mask=jnp.ones(T, bool))
    assert y.shape == (T, O)


LAYER = moejax.linear(2, 3)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ((LAYER.init, LAYER.apply), "a tuple: write moejax.Layer(init, apply)"),
        (LAYER.apply, "a function: moejax.Layer(init, apply) makes one of two functions"),
        (jnp.ones(2), "moejax.Layer(init, apply)"),
    ],
)
@pytest.mark.parametrize("name", ["expert", "router"])
def test_what_is_no_layer_is_refused_where_it_is_given(name, value, advice):
    layers = {"expert": LAYER, "router": LAYER} | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be a Layer.*{re.escape(advice)}"):
        moejax.moe(**layers, num_experts=3)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_module_of_flax_is_refused_by_the_name_of_its_bridge(kind):
    flax = pytest.importorskip(f"flax.{kind}")
    module = flax.Dense(2) if kind == "linen" else flax.Linear(2, 3, rngs=flax.Rngs(0))
    with pytest.raises(ValueError, match=r"`expert` must be a Layer.*from_linen.*from_nnx"):
        moejax.moe(module, LAYER, num_experts=3)


def test_parameters_of_another_number_of_experts_are_named_as_such():
    few, many = (moejax.moe(LAYER, moejax.linear(2, n), num_experts=n) for n in (3, 4))
    params = few.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"`num_experts` \(4\), got parameters of 3 experts"):
        many.apply(params, jnp.ones((5, 2)))


@pytest.mark.parametrize("key", [0, 0.5, None, jnp.ones(2), jax.random.split(jax.random.key(0))])
def test_init_says_what_a_key_is(key):
    model = moejax.moe(LAYER, LAYER, num_experts=3)
    with pytest.raises(ValueError, match=r"takes a PRNG key, such as jax.random.key\(0\)"):
        model.init(key)


def test_keys_of_both_kinds_are_taken():
    model = moejax.moe(LAYER, LAYER, num_experts=3)
    jax.vmap(model.init)(jax.random.split(jax.random.key(0), 2))
    assert model.init(jax.random.PRNGKey(0))["experts"]["kernel"].shape == (3, 2, 3)


@pytest.mark.parametrize("rule", ["softmax", "top_2"])
def test_a_batch_of_padding_alone_has_no_gradient(rule, key):
    mixture = moejax.moe(unit(D, D), unit(D, E), num_experts=E, route=RULES[rule])
    layer = moejax.between(unit(D, D), moejax.with_shared(mixture, unit(D, D)), moejax.linear(D, D))

    def loss(params):
        return layer.apply(params, tokens(T, D), mask=jnp.zeros(T, bool))[0].sum()

    for leaf in jax.tree.leaves(jax.grad(loss)(layer.init(key))):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("mask", [jnp.ones((2, 1), bool), jnp.ones((2, 3))])
def test_between_refuses_what_is_no_mask(mask, key):
    layer = moejax.between(moejax.linear(D, D), model(), moejax.linear(O, D))
    with pytest.raises(
        ValueError, match=re.escape("`mask` must be a boolean array of shape [2, 3]")
    ):
        layer.apply(layer.init(key), tokens(2, 3, D), mask=mask)


def test_a_rule_that_needs_more_says_what(key):
    layer = moejax.moe(EXPERTS["mlp"], moejax.linear(D, E), num_experts=E, route=moejax.top_k)
    with pytest.raises(ValueError, match="The rule needs `k`: bind what it needs with"):
        layer.apply(layer.init(key), tokens(T, D))


@pytest.mark.parametrize("schedule", [moejax.dense, moejax.dropless])
def test_a_method_sees_what_its_object_holds_now(schedule):
    class Net:
        scale = 1.0

        def expert(self, params, x):
            return self.scale * (x @ params)

    net, params, x = Net(), jnp.stack([jnp.eye(D)] * E), tokens(T, D)
    routing = moejax.switch(tokens(T, E))
    before = schedule(net.expert, params, x, routing)
    net.scale = 10.0
    close(schedule(net.expert, params, x, routing), 10 * before)
