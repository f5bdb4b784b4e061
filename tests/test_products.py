"""The product that sparse schedules give to experts: a cheaper gradient, and the same numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import normal
from moejax.schedules._sorted.products import transposing_matmul
from reference import check_gradients

EXPERTS, ROWS, D_IN, D_OUT = 2, 5, 3, 4


def operands(dtype=jnp.float32):
    x = normal(0, EXPERTS, ROWS, D_IN, dtype=dtype)
    return x, normal(1, EXPERTS, D_IN, D_OUT, dtype=dtype)


@partial(jax.jit, static_argnums=0)
def gradients(product, x, kernel):
    scalar = lambda *both: jnp.sum(jnp.sin(product(*both)).astype(jnp.float32))  # noqa: E731
    return jax.grad(scalar, argnums=(0, 1))(x, kernel)


@pytest.mark.parametrize("batched", [lambda f: f, jax.vmap], ids=["stacked", "vmap"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_a_matrix_product(dtype, batched):
    both = operands(dtype)
    product = batched(transposing_matmul)
    np.testing.assert_array_equal(product(*both), jnp.matmul(*both))
    tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 2e-2}[dtype]
    pairs = zip(gradients(product, *both), gradients(jnp.matmul, *both), strict=True)
    for got, expected in pairs:
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance
        )


def test_derivatives_against_finite_differences(x64):
    x, kernel = operands(jnp.float64)
    check_gradients(transposing_matmul, np.asarray(x)[0], np.asarray(kernel)[0], order=2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of it on CPU")
@pytest.mark.usefixtures("optimized")
def test_no_product_on_cpu_reads_its_left_operand_by_columns():
    """Two products in a chunk, as in the batched pass: the plain one shows what to look for."""

    def program(product):
        return jax.jit(lambda *both: gradients(jax.vmap(product), *both)).lower(*operands())

    by_columns = "lhs_batch_dims={0}, lhs_contracting_dims={1}"
    assert by_columns in program(jnp.matmul).compile().as_text()
    assert by_columns not in program(transposing_matmul).compile().as_text()
