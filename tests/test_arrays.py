"""Small functions of arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

from moejax._arrays import normal_cdf, separate_zeros
from reference import close


def test_zeros_are_zeros_in_the_dtypes_of_the_leaves():
    like = {"a": jnp.ones((2, 3)), "b": (jnp.ones(4, jnp.bfloat16), None, jnp.ones((), jnp.int32))}
    zeros = jax.jit(lambda number: separate_zeros(like, number))(jnp.int32(7))
    expected = jax.tree.map(jnp.zeros_like, like)
    jax.tree.map(np.testing.assert_array_equal, zeros, expected)
    assert jax.tree.map(lambda a: a.dtype, zeros) == jax.tree.map(lambda a: a.dtype, like)


@pytest.mark.usefixtures("optimized")
def test_a_loop_that_writes_to_several_zeros_copies_none():
    like = [jax.ShapeDtypeStruct((64, 8), jnp.float32)] * 2

    def copies(zeros):
        def run(count, rows):
            write = lambda i, tree: [leaf.at[i].set(rows[i]) for leaf in tree]  # noqa: E731
            return jax.lax.fori_loop(0, count, write, zeros(count))

        text = jax.jit(run).lower(jnp.int32(3), jnp.ones((64, 8))).compile().as_text()
        return len(re.findall(r"f32\[64,8\]\S* copy\(", text))

    assert copies(lambda count: separate_zeros(like, count)) == 0
    assert copies(lambda count: jax.tree.map(jnp.zeros_like, like)) > 0  # or it has no reason


def test_the_normal_distribution_and_its_derivatives():
    x = jnp.linspace(-6, 6, 25)
    with jax.enable_x64(True):
        wide = x.astype(float)
        close(normal_cdf(wide), scipy.stats.norm.cdf(wide), rtol=1e-12)
        density = jax.jit(jax.vmap(jax.grad(normal_cdf)))(wide)
        close(density, scipy.stats.norm.pdf(wide), rtol=1e-12)
        check_grads(jax.jit(normal_cdf), (wide,), order=2)
    close(x * normal_cdf(x), jax.nn.gelu(x, approximate=False), rtol=1e-6)
