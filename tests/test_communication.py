"""Bytes read from compiled programs equal those counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import moejax
from benchmarks.collectives import bytes_sent, collectives
from cases import params_of
from moejax.sharding import expert_parallel, shardings, token_sharding, tokenwise

TOP_2 = partial(moejax.top_k, k=2)


def make_mesh(shape=(2, 4)):
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "expert"), axis_types=kinds)


OPERATIONS = {
    # result of b bytes and kind -> bytes sent by each of g = 4 devices
    "all-reduce": (lambda x: jax.lax.psum(x, "expert"), 2 * 3 / 4 * 32),
    "all-gather": (lambda x: jax.lax.all_gather(x, "expert"), 3 / 4 * 128),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "expert", tiled=True), 3 * 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True), 3 / 4 * 32),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "expert", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        32,
    ),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_bytes_of_one_operation(kind):
    function, expected = OPERATIONS[kind]
    mesh, spec = make_mesh(), jax.P(("data", "expert"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.device_put(
        np.ones(64, np.float32), token_sharding(mesh)
    )  # 8 floats, 32 bytes, on each device
    assert bytes_sent(jax.jit(mapped).lower(x).compile()) == {kind: expected}


def compiled_layer(mesh, route, execute, num_tokens, dtype=jnp.float32):
    """The gradient of one layer with respect to parameters and tokens."""
    layer = moejax.moe(
        moejax.linear(16, 16), moejax.linear(16, 8), num_experts=8, route=route, execute=execute
    )
    params = params_of(layer)
    params = jax.device_put(params, shardings(params, mesh))
    x = jax.device_put(np.ones((num_tokens, 16), dtype), token_sharding(mesh))

    def loss(params, x):
        y, routing = layer.apply(params, x)
        return jnp.sum(y.astype(jnp.float32) ** 2) + moejax.load_balancing_loss(routing)

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_exchange_sends_no_more_than_its_blocks(shape):
    mesh = make_mesh(shape)
    execute = expert_parallel(mesh, local=moejax.dense)
    step = compiled_layer(mesh, tokenwise(TOP_2, mesh), execute, num_tokens=512)
    num_shards, choices = shape[1], 2 * 512 // 8
    rows = 1.25 * choices * (num_shards - 1) / num_shards
    counts = 4 * 8 * (num_shards - 1) / num_shards
    exchanged = bytes_sent(step).get("all-to-all", 0)
    assert exchanged == pytest.approx(4 * rows * 16 * 4 + counts)  # there and back, both passes
    assert "all-gather" not in bytes_sent(step)
    further = {one.kind for one in collectives(step) if not one.always}
    assert further == ({"all-to-all"} if num_shards > 1 else set())


def test_partitioner_alone_gathers_what_the_exchange_does_not():
    mesh = make_mesh()
    alone = bytes_sent(compiled_layer(mesh, TOP_2, moejax.dense, num_tokens=512))
    assert alone["all-gather"] > 0


def test_programs_for_other_devices_are_refused():
    class Program:
        def as_text(self):
            return "ENTRY %main {\n  %a = f32[8] all-gather-start(%b), replica_groups={{0,1}}\n}"

    with pytest.raises(ValueError, match="compiled for CPU"):
        collectives(Program())
