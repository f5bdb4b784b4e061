"""The mixture on a mesh of eight devices is the mixture on one, in every kind of mesh."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moejax
from cases import EXPERTS, normal, params_of
from moejax.interop.transformers.fields import ACTIVATIONS
from moejax.schedules._mesh.exchange import ragged_exchange
from moejax.sharding import expert_parallel, shardings, token_sharding, tokenwise
from moejax.training import init_state, train_step
from reference import close

T, D, E = 32, 4, 8
LINEAR = moejax.linear(D, 3)
TOP_2 = partial(moejax.top_k, k=2)
KINDS = [AxisType.Auto, AxisType.Explicit]


def make_mesh(kind=AxisType.Auto, shape=(2, 4), axis="expert"):
    return jax.make_mesh(shape, ("data", axis), axis_types=(kind, kind))


def inputs(feature_shape=(D,), dtype=jnp.float32):
    return normal(1, T, *feature_shape, dtype=dtype), jax.device_put(np.arange(T) % 5 > 0)


def bend(params, x):
    """Little to compile, though not linear and, with its bias, not zero at a token of zeros."""
    return jnp.tanh(LINEAR.apply(params, x))


BENT = moejax.Layer(LINEAR.init, bend)


@cache
def outcome(model):
    """Jitted: output, balance losses, load, and the gradient of all of them together."""

    def total(params, x, mask, key):
        y, routing = model.apply(params, x, key=key, mask=mask)
        evidence = {
            "y": y.astype(jnp.float32),
            "load_balancing": moejax.load_balancing_loss(routing),
            "importance": moejax.importance_loss(routing),
            "z": moejax.router_z_loss(routing),
            "load": routing.counts,
        }
        weight = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
        losses = [evidence[name] for name in ("load_balancing", "importance", "z")]
        return jnp.sum(weight * evidence["y"]) + sum(losses), evidence

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def assert_same_on_mesh(mesh, route, *, axis="expert", expert=BENT, params=None, x=None,
                        mask=None, mesh_route=None, key=None, rtol=2e-6, **options):  # fmt: skip
    # The quickest to compile: of each device's schedules, and without rounds after the first.
    options = {"local": moejax.dense, "factor": E} | options
    build = partial(moejax.moe, expert, moejax.linear(D, E), num_experts=E)
    single = build(route=route, execute=moejax.dense)
    spread = build(route=mesh_route or route, execute=expert_parallel(mesh, axis=axis, **options))
    params = params_of(single) if params is None else params
    x = inputs()[0] if x is None else x
    expected = outcome(single)(params, x, mask, key)
    params = jax.device_put(params, shardings(params, mesh, axis=axis))
    x, mask = jax.device_put((x, mask), token_sharding(mesh))
    got = outcome(spread)(params, x, mask, key)
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=5 * rtol)
    jax.tree.map(close, jax.device_get(got), jax.device_get(expected))
    return got


RULES = {
    "softmax": moejax.softmax,
    "top_2": TOP_2,
    "switch": moejax.switch,
    "noisy_top_2": partial(moejax.noisy_top_k, noise_scale=0.5, k=2),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_every_kind_of_mesh(rule, kind, key):
    assert_same_on_mesh(make_mesh(kind), RULES[rule], mask=inputs()[1], key=key)


@pytest.mark.parametrize(("shape", "kind"), [((1, 8), KINDS[0]), ((8, 1), KINDS[1])], ids=str)
def test_rules_on_each_device_on_every_shape_of_mesh(shape, kind):
    mesh = make_mesh(kind, shape)
    assert_same_on_mesh(mesh, TOP_2, mesh_route=tokenwise(TOP_2, mesh), mask=inputs()[1])


@pytest.mark.parametrize("axes", [P(), P("data"), P("data", "expert")], ids=str)
def test_sequences_come_back_where_they_were_on_explicit_axes(axes):
    mesh = make_mesh(AxisType.Explicit)
    x = np.asarray(inputs()[0]).reshape(4, -1, D)  # fewer sequences than devices
    layer = partial(moejax.moe, BENT, moejax.linear(D, E), num_experts=E, route=TOP_2)
    model, on_mesh = layer(), layer(execute=expert_parallel(mesh))
    params = params_of(model)
    y, _ = jax.jit(on_mesh.apply)(params, jax.device_put(x, NamedSharding(mesh, axes)))
    assert tuple(y.sharding.spec) == (*axes, *[None] * (3 - len(axes)))
    close(y, jax.jit(model.apply)(params, x)[0], 1e-6)


def test_the_axis_of_the_experts_may_have_another_name():
    assert_same_on_mesh(make_mesh(axis="model"), TOP_2, axis="model", mask=inputs()[1])


def test_every_device_draws_its_own_noise(key):
    route = tokenwise(partial(moejax.noisy_top_k, noise_scale=1.0, k=2), make_mesh())
    scores = jax.jit(route)(np.zeros((T, E), np.float32), key=key).scores
    by_device = np.asarray(scores).reshape(8, -1)
    assert len(np.unique(by_device, axis=0)) == 8


def test_a_bias_per_expert_is_whole_on_each_device(key):
    mesh, route = make_mesh(), partial(moejax.sigmoid_top_k, k=2)
    x = normal(0, T, D)

    def model(**options):
        router = moejax.biased(moejax.linear(D, E), E)
        return moejax.moe(BENT, router, num_experts=E, **options)

    single = model(route=route, execute=moejax.dense)
    params = params_of(single)
    expected, _ = jax.jit(single.apply)(params, x)
    execute = expert_parallel(mesh, local=moejax.dense)
    spread = model(route=tokenwise(route, mesh), execute=execute)
    got, _ = jax.jit(spread.apply)(
        jax.device_put(params, shardings(params, mesh)), jax.device_put(x, token_sharding(mesh))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def collapsed(logits):
    """Every token's first choice is expert 5, whose device then needs several rounds."""
    return moejax.top_k(logits.at[:, 5].add(100), k=2)


@pytest.mark.parametrize(
    ("factor", "kind"), [(0.2, KINDS[0]), (1.25, KINDS[0]), (1.25, KINDS[1]), (100, KINDS[0])]
)
def test_nothing_is_dropped_when_routing_collapses(factor, kind):
    options = {"factor": factor, "local": moejax.dropless, "mask": inputs()[1]}
    evidence = assert_same_on_mesh(make_mesh(kind), collapsed, **options)[0][1]
    assert evidence["load"][5] == np.sum(inputs()[1])


@pytest.mark.parametrize("tokens", [0, 5])  # five are all on the first two of eight devices
def test_devices_without_any_token_and_experts_without_any(tokens, key):
    mask = jax.device_put(np.arange(T) < tokens)
    assert_same_on_mesh(make_mesh(), TOP_2, mask=mask, key=key)


def test_the_activations_of_published_models():
    def activated(params, x):
        z = LINEAR.apply(params, x)
        return sum(ACTIVATIONS[name](z) for name in ("gelu", "gelu_new", "silu"))

    expert = moejax.Layer(LINEAR.init, activated)
    assert_same_on_mesh(make_mesh(), TOP_2, expert=expert)


def test_a_users_expert_and_schedule():
    local = partial(moejax.capacity, factor=E)
    assert_same_on_mesh(make_mesh(), TOP_2, expert=EXPERTS["fourier"], local=local)


def test_bfloat16_stays_bfloat16():
    mesh = make_mesh()
    layer = moejax.moe(LINEAR, moejax.linear(D, E), num_experts=E, execute=expert_parallel(mesh))
    x = inputs(dtype=jnp.bfloat16)[0]
    y, _ = jax.eval_shape(layer.apply, params_of(layer), x)
    assert y.dtype == jnp.bfloat16
    assert_same_on_mesh(mesh, moejax.softmax, x=x, rtol=2e-2, factor=1.25)


def test_losses_are_of_the_whole_batch_and_not_means_over_devices():
    mesh = make_mesh(shape=(1, 8))
    blocks = np.float32(np.repeat(10 * np.eye(E), T // E, axis=0))  # device d: all to expert d
    loss = lambda logits: moejax.load_balancing_loss(moejax.switch(logits))  # noqa: E731
    on_mesh = jax.jit(loss)(jax.device_put(blocks, token_sharding(mesh)))
    per_device = np.mean(jax.jit(jax.vmap(loss))(blocks.reshape(8, -1, E)))
    np.testing.assert_allclose(on_mesh, 1, atol=1e-3)  # balanced over the mesh
    assert per_device > 7  # though on every device collapsed


def test_second_derivatives_and_forward_mode():
    mesh = make_mesh()

    def scalar(execute, x):
        layer = moejax.moe(BENT, moejax.linear(D, E), num_experts=E, route=TOP_2, execute=execute)
        return jnp.sum(jnp.sin(layer.apply(params_of(layer), x)[0]))

    x = inputs()[0]
    hessian_vector = lambda execute: jax.jit(  # noqa: E731
        lambda x: jax.jvp(jax.grad(partial(scalar, execute)), (x,), (jnp.cos(x),))[1]
    )(x)
    on_mesh = hessian_vector(expert_parallel(mesh, factor=0.2, local=moejax.dense))
    np.testing.assert_allclose(on_mesh, hessian_vector(moejax.dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "experts", "message"),
    [(30, 8, "tokens must be a multiple of the mesh's 8"), (32, 6, "experts must be a multiple")],
)
def test_sizes_that_do_not_divide(tokens, experts, message):
    layer = moejax.moe(moejax.linear(D, 2), moejax.linear(D, experts), num_experts=experts,
                       execute=expert_parallel(make_mesh()))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        layer.apply(params_of(layer), jnp.ones((tokens, D)))


def test_no_tokens_give_no_outputs():
    expert = moejax.linear(D, 2)
    params = params_of(moejax.stack(expert, E))
    routing = moejax.top_k(jnp.zeros((0, E)), k=2)
    y = expert_parallel(make_mesh())(expert.apply, params, jnp.zeros((0, D)), routing)
    assert y.shape == (0, 2)


def test_other_arguments_that_cannot_work():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="'model'"):
        expert_parallel(mesh, axis="model")
    with pytest.raises(ValueError, match="positive finite number, got 0"):
        expert_parallel(mesh, factor=0)
    with pytest.raises(ValueError, match="positive finite number, got inf"):
        expert_parallel(mesh, factor=math.inf)
    with pytest.raises(ValueError, match="'expert'"):
        shardings({}, jax.make_mesh((8,), ("data",)))
    with pytest.raises(ValueError, match=r"\['experts'\].*multiple of 4 experts.*\(6, 2\)"):
        shardings({"experts": jnp.ones((6, 2))}, mesh)
    with pytest.raises(ValueError, match="multiple of the mesh's 8 devices, got 12"):
        tokenwise(TOP_2, mesh)(jnp.ones((12, 8)))


def test_placement_covers_the_optimizer_state():
    mesh = make_mesh()
    layer = moejax.moe(moejax.linear(D, 2), moejax.linear(D, E), num_experts=E)
    state = init_state(params_of(layer), optax.adam(1e-3), jax.random.key(1))
    state = jax.device_put(state, shardings(state, mesh))
    moments = state.opt_state[0].mu
    assert moments["experts"]["kernel"].sharding.shard_shape((E, D, 2)) == (E // 4, D, 2)
    assert moments["router"]["kernel"].sharding.is_fully_replicated


def test_sharded_parameters_alone_are_enough_on_auto_axes():
    mesh = make_mesh()
    build = partial(moejax.moe, BENT, moejax.linear(D, E), num_experts=E, route=TOP_2)
    layer = build()
    params, (x, mask) = params_of(layer), inputs()
    expected = outcome(build(execute=moejax.dense))(params, x, mask, None)
    params = jax.device_put(params, shardings(params, mesh))
    x, mask = jax.device_put((x, mask), token_sharding(mesh))
    got = outcome(layer)(params, x, mask, None)
    close = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-5)
    jax.tree.map(close, jax.device_get(got), jax.device_get(expected))


def emulated_ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
                    axis_name, **_):  # fmt: skip
    """What the documentation of `jax.lax.ragged_all_to_all` says, for backends without it."""
    sent = jax.tree.map(
        partial(jax.lax.all_gather, axis_name=axis_name),
        (operand, input_offsets, send_sizes, output_offsets),
    )
    me = jax.lax.axis_index(axis_name)
    rows, starts, sizes, ends = sent[0], *(one[:, me, None] for one in sent[1:])
    after = jnp.arange(len(output))[None] - ends  # [source, place], from where its rows begin
    inside = (after >= 0) & (after < sizes)
    sources = jnp.arange(len(rows))[:, None]
    moved = rows.at[sources, starts + after].get(mode="clip")  # [source, place, ...]
    kept = jnp.where(inside.reshape(*inside.shape, *[1] * (output.ndim - 1)), moved, 0)
    filled = inside.sum(axis=0).reshape(-1, *[1] * (output.ndim - 1))
    arrived = inside.sum(axis=1)
    defined = jnp.all(arrived == recv_sizes) & jnp.all(filled <= 1)
    return jnp.where(defined, jnp.where(filled == 1, kept.sum(axis=0), output), jnp.nan)


@pytest.mark.parametrize("factor", [0.2, 1.25])
def test_ragged_exchange_sends_the_right_rows(monkeypatch, factor):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged)
    assert_same_on_mesh(make_mesh(), TOP_2, factor=factor, exchange=ragged_exchange,
                        mask=inputs()[1])  # fmt: skip


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_ragged_exchange_lowers_where_it_is_the_default(platform):
    mesh = make_mesh()
    layer = moejax.moe(BENT, moejax.linear(D, E), num_experts=E, route=TOP_2,
                       execute=expert_parallel(mesh, exchange=ragged_exchange))  # fmt: skip
    params = jax.device_put(params_of(layer), jax.NamedSharding(mesh, jax.P()))
    x = jax.device_put(inputs()[0], token_sharding(mesh))
    lowered = outcome(layer).trace(params, x, None, None).lower(lowering_platforms=(platform,))
    assert "ragged_all_to_all" in lowered.as_text()


def losses_of_a_hundred_steps(state_sharding, batch_sharding, route, execute):
    """By Adam, whose moments are sharded as the parameters are."""
    layer = moejax.moe(BENT, moejax.linear(D, E), num_experts=E, route=route, execute=execute)

    def loss(params, x, key):
        y, routing = layer.apply(params, x, key=key)
        aim = jnp.sin(x[:, :3]) ** 2
        return jnp.mean((y - aim) ** 2) + 0.01 * moejax.load_balancing_loss(routing), {}

    optimizer = optax.adam(1e-2)
    state = init_state(params_of(layer), optimizer, jax.random.key(1))
    state = jax.device_put(state, state_sharding(state))
    step, history = jax.jit(train_step(loss, optimizer)), []
    for number in range(100):
        x = jax.device_put(normal(number, T, D), batch_sharding)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
            state, metrics = step(state, x)
        history.append(float(metrics["loss"]))
    return np.array(history)


@cache
def losses_on_one_device():
    one = jax.devices()[0]
    return losses_of_a_hundred_steps(lambda state: one, one, TOP_2, moejax.dense)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_hundred_training_steps_have_the_losses_of_one_device(kind):
    mesh, one = make_mesh(kind), losses_on_one_device()
    given = partial(shardings, mesh=mesh), token_sharding(mesh)
    execute = expert_parallel(mesh, local=moejax.dense)
    many = losses_of_a_hundred_steps(*given, tokenwise(TOP_2, mesh), execute)
    assert one[-1] < one[0] / 2
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


def test_a_rule_that_names_a_key_gets_one_or_none():
    def route(logits, *, key):
        return moejax.noisy_top_k(logits, 0.1, k=2, key=key)

    mesh, logits = make_mesh(), normal(0, T, E)
    found, expected = tokenwise(route, mesh)(logits), route(logits, key=None)
    np.testing.assert_array_equal(found.experts, expected.experts)


def test_moments_that_are_not_factored_are_on_every_device():
    mesh, layer = make_mesh(), moejax.moe(moejax.glu(D, 8), moejax.linear(D, E), num_experts=E)
    state = optax.adafactor(1e-3).init(params_of(layer))
    placed = jax.device_put(state, shardings(state, mesh))
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(placed)}
    assert specs == {jax.P(), jax.P("expert")}
