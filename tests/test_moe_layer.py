"""The composed layer: shapes, masks, keys, transformations and errors."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import EXPERTS, RULES, D, E, O, T, normal, params_of, unit
from moejax.moe_layer import default_schedule

close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def model(rule="top_2", **options):
    return moejax.moe(
        EXPERTS["mlp"], moejax.linear(D, E), num_experts=E, route=RULES[rule], **options
    )


def tokens(*shape):
    return normal(3, *shape)


def test_leading_axes_are_tokens():
    params = params_of(model())
    x = tokens(2, 3, D)
    y, routing = model().apply(params, x)
    flat, _ = model().apply(params, x.reshape(6, D))
    assert y.shape == (2, 3, O)
    assert routing.experts.shape == (6, 2)
    np.testing.assert_array_equal(np.asarray(y).reshape(6, O), flat)


def total(rule, params, x, **masked):
    """A number to differentiate, and what it is made of."""
    y, routing = model(rule).apply(params, x, **masked)
    losses = moejax.load_balancing_loss, moejax.importance_loss, moejax.router_z_loss
    losses = [loss(routing) for loss in losses]
    return (y**2).sum() + sum(losses), (y, routing, losses)


@cache
def masked_run(rule):
    """Of T tokens, by parameters, tokens and mask: the parts of the total, and its gradients."""
    run = jax.jit(jax.value_and_grad(partial(total, rule), has_aux=True))

    def parts_and_gradients(params, x, mask):
        (_, parts), gradients = jax.device_get(run(params, x, mask=mask))
        return *parts, gradients

    return parts_and_gradients


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_a_masked_token_goes_nowhere_and_changes_nothing(rule):
    params = params_of(model(rule))
    x = tokens(T, D)
    mask = np.arange(T) % 3 != 1
    x = np.where(mask[:, None], x, np.float32(np.nan))  # padding may hold anything
    y, routing, losses, _ = masked_run(rule)(params, x, mask)
    _, (kept, _, kept_losses) = jax.jit(partial(total, rule))(params, x[mask])
    experts, weights = routing.experts, routing.weights
    close(y[mask], kept)
    assert not y[~mask].any()
    assert (experts[~mask] == E).all()
    assert not weights[~mask].any()
    close(losses, kept_losses)


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_gradient_with_nan_padding_is_finite(rule):
    mask = np.arange(T) < 4
    x = np.where(mask[:, None], tokens(T, D), np.float32(np.nan))
    *_, gradients = masked_run(rule)(params_of(model(rule)), x, mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_all_tokens_masked():
    y, _, losses, _ = masked_run("top_2")(params_of(model()), tokens(T, D), np.zeros(T, bool))
    assert not y.any()
    assert losses == [0, 0, 0]


def test_no_key_no_noise(key):
    noisy = moejax.noisy(moejax.linear(D, E), moejax.linear(D, E))
    options = {"route": partial(moejax.noisy_top_k, k=2), "execute": moejax.dense}
    layer = moejax.moe(EXPERTS["mlp"], noisy, num_experts=E, **options)
    params = params_of(layer)
    x = tokens(T, D)
    still = layer.apply(params, x)[1]
    np.testing.assert_array_equal(still.weights, layer.apply(params, x)[1].weights)
    one, two = (layer.apply(params, x, key=jax.random.key(i))[1] for i in (0, 1))
    assert not np.array_equal(one.scores, two.scores)
    np.testing.assert_array_equal(one.logits, still.logits)


def test_a_token_of_several_axes():
    router = moejax.linear(4, E)
    layer = moejax.moe(
        moejax.Layer(EXPERTS["mlp"].init, lambda p, x: EXPERTS["mlp"].apply(p, x.mean(axis=1))),
        moejax.Layer(router.init, lambda p, x: router.apply(p, x[:, 0])),
        num_experts=E,
        route=RULES["top_2"],
        feature_ndim=2,
    )
    y, routing = jax.eval_shape(layer.apply, params_of(layer), tokens(2, 5, 3, D))
    assert y.shape == (2, 5, O)
    assert routing.weights.shape == (10, 2)


def test_a_shared_expert_of_images():
    expert, router = EXPERTS["pixelwise"], moejax.linear(D, E)
    mean = moejax.Layer(router.init, lambda p, x: router.apply(p, x.mean(axis=(1, 2))))
    plain = moejax.moe(expert, mean, num_experts=E, feature_ndim=3)
    layer = moejax.with_shared(plain, expert, feature_ndim=3)
    params, x = params_of(layer), tokens(2, 4, 3, 2, D)
    y, _ = layer.apply(params, x)
    shared = expert.apply(params["shared"], x.reshape(8, 3, 2, D))
    close(y, plain.apply(params["routed"], x)[0] + shared.reshape(2, 4, 2, O))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_router_reads_narrow_tokens_in_float32(dtype, key):
    seen, router = [], moejax.linear(D, E)

    def apply(params, x):
        seen.append(x.dtype)
        return router.apply(params, x)

    layer = moejax.moe(EXPERTS["mlp"], moejax.Layer(router.init, apply), num_experts=E)
    params, x = jax.eval_shape(layer.init, key), jax.ShapeDtypeStruct((T, D), dtype)
    y, _ = jax.eval_shape(layer.apply, params, x)
    assert seen == [jnp.float32]
    assert y.dtype == dtype


def test_the_schedule_by_default_fits_the_decision():
    logits = tokens(T, E)
    assert default_schedule(moejax.softmax(logits)) is moejax.dense
    assert default_schedule(moejax.top_k(logits, k=2)) is moejax.dropless


def test_mixture_of_mixtures():
    inner = moejax.moe(moejax.linear(D, O), moejax.linear(D, 3), num_experts=3)
    outer = moejax.moe(
        moejax.Layer(inner.init, lambda params, x: inner.apply(params, x)[0]),
        moejax.linear(D, E),
        num_experts=E,
        route=RULES["top_2"],
    )
    params = params_of(outer)
    x = tokens(T, D)
    y, routing = jax.device_get(jax.jit(outer.apply)(params, x))
    params, apply = jax.device_get(params), jax.jit(inner.apply)
    expected = np.zeros((T, O))
    for t in range(T):
        for e, weight in zip(routing.experts[t], routing.weights[t], strict=True):
            own = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
            expected[t] += weight * apply(own, np.asarray(x)[t : t + 1])[0][0]
    close(y, expected)


def test_vmap_over_seeds(key):
    layer = moejax.moe(EXPERTS["linear"], moejax.linear(D, E), num_experts=E)
    keys = jax.random.split(key, 3)
    params = jax.device_get(jax.jit(jax.vmap(layer.init))(keys))
    x, apply = tokens(T, D), jax.jit(layer.apply)
    y, _ = jax.jit(jax.vmap(layer.apply, in_axes=(0, None)))(params, x)
    for i, own in enumerate(jax.device_get(y)):
        close(own, apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)[0])


def test_scan_over_layers():
    experts, router = moejax.linear(D, D), moejax.linear(D, E)
    layer = moejax.moe(experts, router, num_experts=E, route=RULES["top_2"])
    params = jax.device_get(params_of(moejax.stack(layer, 3)))

    def body(x, own):
        y, routing = layer.apply(own, x)
        return x + y, moejax.load_balancing_loss(routing)

    x, losses = jax.lax.scan(body, tokens(T, D), params)
    expected, apply = np.asarray(tokens(T, D)), jax.jit(layer.apply)
    for i in range(3):
        expected = expected + apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), expected)[0]
    close(x, expected)
    assert losses.shape == (3,)  # one loss per layer


def test_compiles_once():
    params = params_of(model())
    apply = jax.jit(model().apply)
    apply(params, tokens(T, D))
    other = tokens(T, D) + 1
    with jax.no_tracing():
        apply(params, other)


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
@pytest.mark.parametrize("shape", [(1, D), (0, D), (2, 1, D)])
def test_few_tokens(rule, shape):
    y, _ = jax.jit(model(rule).apply)(params_of(model(rule)), tokens(*shape))
    assert y.shape == (*shape[:-1], O)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_extreme_logits(rule, scale):
    router = {"kernel": np.float32(scale * np.eye(D, E)), "bias": np.zeros(E, np.float32)}
    x = np.float32(np.eye(D)[np.arange(T) % D])
    params = params_of(model(rule)) | {"router": router}
    y, routing, _, gradients = masked_run(rule)(params, x, np.ones(T, bool))
    np.testing.assert_array_equal(routing.logits, scale * x)  # as wide as there are experts
    assert np.isfinite(y).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_a_nan_token_stays_alone(rule):
    params, x = params_of(model(rule)), tokens(T, D)
    others = np.arange(T) != 2
    spoiled = np.where(others[:, None], x, np.float32(np.nan))
    y, expected = (masked_run(rule)(params, one, np.ones(T, bool))[0] for one in (spoiled, x))
    close(y[others], expected[others])
    assert np.isnan(y[2]).all()


def test_all_tokens_on_one_expert_and_the_others_empty(key):
    one = moejax.Layer(lambda key: (), lambda p, x: jnp.tile(10.0 * jnp.eye(E)[1], (len(x), 1)))
    layer = moejax.moe(EXPERTS["mlp"], one, num_experts=E, route=moejax.switch)
    params, x = jax.device_get(params_of(layer)), tokens(T, D)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_parts(params):
        y, routing = layer.apply(params, x)
        return y.sum(), (y, routing)

    gradients, (y, routing) = gradient_and_parts(params)
    own = jax.tree.map(lambda leaf: leaf[1], params["experts"])
    close(y, np.asarray(routing.weights) * EXPERTS["mlp"].apply(own, x))
    empty = [np.asarray(leaf)[[0, 2, 3]] for leaf in jax.tree.leaves(gradients["experts"])]
    assert not any(leaf.any() for leaf in empty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: model().apply(p, tokens(D)), "at least one axis of tokens"),
        (lambda p: model().apply(p, tokens(T, D), mask=jnp.ones(2, bool)), "`mask` must be"),
        (lambda p: model().apply(p, tokens(T, D), mask=jnp.ones(T)), "`mask` must be"),
        (
            lambda p: moejax.moe(EXPERTS["mlp"], moejax.linear(D, E), num_experts=E + 1).apply(
                p | {"experts": params_of(moejax.stack(EXPERTS["mlp"], E + 1))},
                tokens(T, D),
            ),
            f"must return one logit per token and expert, \\[{T}, 5\\], got \\[{T}, 4\\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(params_of(model()))


@pytest.mark.parametrize("stacked", [E - 1, E + 1])
@pytest.mark.parametrize("rule", ["softmax", "top_2", "switch"])
def test_parameters_of_another_number_of_experts_are_refused(rule, stacked):
    params = params_of(model()) | {"experts": params_of(moejax.stack(EXPERTS["mlp"], stacked))}
    with pytest.raises(ValueError, match=f"`num_experts` \\({E}\\), got .*{stacked}"):
        model(rule).apply(params, tokens(1, D))


def test_forward_mode_is_that_of_dense():
    """As the docstring says: reverse mode everywhere, forward mode by `dense`."""
    linear = partial(moejax.moe, EXPERTS["linear"], moejax.linear(D, E), num_experts=E)
    sparse, dense = (linear(route=RULES["top_2"], **how) for how in ({}, {"execute": moejax.dense}))
    params, experts = (params_of(dense)[part] for part in ("router", "experts"))

    def loss(layer, router):
        return (layer.apply({"router": router, "experts": experts}, tokens(2, D))[0] ** 2).sum()

    with pytest.raises(TypeError, match="forward-mode"):
        jax.eval_shape(jax.hessian(partial(loss, sparse)), params)
    forward = jax.jit(jax.hessian(partial(loss, dense)))(params)
    backward = jax.jit(jax.jacrev(jax.jacrev(partial(loss, sparse))))(params)
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
    given = {"key": key, "mask": np.ones(T, bool)}
    y, _ = jax.eval_shape(layer.apply, params_of(layer), tokens(T, D), **given)
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
    params = params_of(few)
    with pytest.raises(ValueError, match=r"`num_experts` \(4\), got parameters of 3 experts"):
        many.apply(params, jnp.ones((5, 2)))


@pytest.mark.parametrize("key", [0, 0.5, None, jnp.ones(2), jax.random.split(jax.random.key(0))])
def test_init_says_what_a_key_is(key):
    model = moejax.moe(LAYER, LAYER, num_experts=3)
    with pytest.raises(ValueError, match=r"takes a PRNG key, such as jax.random.key\(0\)"):
        model.init(key)


def test_keys_of_both_kinds_are_taken():
    model = moejax.moe(LAYER, LAYER, num_experts=3)
    jax.eval_shape(jax.vmap(model.init), jax.random.split(jax.random.key(0), 2))
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    assert params["experts"]["kernel"].shape == (3, 2, 3)


@pytest.mark.parametrize("rule", ["softmax", "top_2"])
def test_a_batch_of_padding_alone_has_no_gradient(rule):
    mixture = moejax.moe(unit(D, D), unit(D, E), num_experts=E, route=RULES[rule])
    layer = moejax.between(unit(D, D), moejax.with_shared(mixture, unit(D, D)), moejax.linear(D, D))

    def loss(params):
        return layer.apply(params, tokens(T, D), mask=jnp.zeros(T, bool))[0].sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params_of(layer))):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("mask", [jnp.ones((2, 1), bool), jnp.ones((2, 3))])
def test_between_refuses_what_is_no_mask(mask):
    layer = moejax.between(moejax.linear(D, D), model(), moejax.linear(O, D))
    with pytest.raises(
        ValueError, match=re.escape("`mask` must be a boolean array of shape [2, 3]")
    ):
        layer.apply(params_of(layer), tokens(2, 3, D), mask=mask)


def test_a_rule_that_needs_more_says_what():
    layer = moejax.moe(EXPERTS["mlp"], moejax.linear(D, E), num_experts=E, route=moejax.top_k)
    with pytest.raises(ValueError, match="The rule needs `k`: bind what it needs with"):
        layer.apply(params_of(layer), tokens(T, D))


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


@pytest.mark.parametrize("schedule", [moejax.dense, moejax.dropless])
def test_a_layer_made_of_a_method_sees_what_its_object_holds_now(schedule):
    class Net:
        scale = 1.0

        def activation(self, x):
            return self.scale * x

    net, x = Net(), tokens(T, D)
    expert = moejax.mlp(
        D, 3, D, layer=partial(moejax.linear, bias=False), activation=net.activation
    )
    params = params_of(moejax.stack(expert, E))
    routing = moejax.switch(tokens(T, E))
    before = schedule(expert.apply, params, x, routing)
    net.scale = 10.0
    close(schedule(expert.apply, params, x, routing), 10 * before)


def a_mixture():
    return moejax.moe(moejax.linear(D, D), moejax.linear(D, E), num_experts=E)


BAD_PLACES = {
    "a router that returns a list": (
        lambda: moejax.moe(
            moejax.linear(D, D),
            moejax.Layer(lambda key: {}, lambda params, x: [x]),
            num_experts=E,
        ),
        "must return logits, an array, or a tuple that begins with them, got a list",
    ),
    "a noisy router in a biased one": (
        lambda: moejax.moe(
            moejax.linear(D, D),
            moejax.biased(moejax.noisy(moejax.linear(D, E), moejax.linear(D, E)), E),
            num_experts=E,
        ),
        "got a tuple: only the outermost router may be `noisy` or `biased`",
    ),
    "a mixture that always runs": (
        lambda: moejax.with_shared(*[a_mixture()] * 2),
        "must return one array, got a tuple: wrap a mixture in `outputs_of`",
    ),
    "a layer as a mixture": (
        lambda: moejax.with_shared(moejax.linear(D, D), moejax.linear(D, D)),
        "The model of `with_shared` must return its output and a decision",
    ),
    "a mixture behind a gate": (
        lambda: moejax.gated(a_mixture(), moejax.linear(D, 1)),
        "must return one array, got a tuple: wrap a mixture in `outputs_of`",
    ),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_what_returns_something_else_is_refused(case, key):
    make, message = BAD_PLACES[case]
    layer = make()
    params = jax.eval_shape(layer.init, key)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.apply, params, tokens(T, D))
