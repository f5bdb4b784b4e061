"""The grouped product against a loop: values, derivatives, transformations, refusals."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import normal
from moejax.schedules._sorted.products import ragged_matmul
from moejax.schedules.grouped_matmul import batched_and_blocked, grouped_matmul
from reference import check_gradients, close

M, D, O, E = 40, 3, 5, 4  # noqa: E741
SIZES = {
    "even": [10, 10, 10, 10],
    "uneven": [1, 22, 7, 10],
    "rows past the end": [3, 0, 20, 4],
    "one giant group": [0, 40, 0, 0],
    "all empty": [0, 0, 0, 0],
}
IMPLEMENTATIONS = {"blocked": batched_and_blocked, "ragged": ragged_matmul}


def operands(dtype=jnp.float32, rows=M):
    return normal(0, rows, D, dtype=dtype), normal(1, E, D, O, dtype=dtype)


def test_it_is_one_of_the_two():
    chosen = batched_and_blocked if jax.default_backend() == "cpu" else ragged_matmul
    arguments = (*operands(), np.int32(SIZES["even"]))
    traced = [str(jax.make_jaxpr(product)(*arguments)) for product in (grouped_matmul, chosen)]
    assert traced[0] == traced[1]


def loop(x, kernel, sizes):
    """One product per group, and zeros for the rows past the last."""
    return _loop(x, kernel, tuple(int(size) for size in sizes))


@partial(jax.jit, static_argnums=2)  # as a whole, or each group would be several programs
def _loop(x, kernel, sizes):
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    groups = [x[a:b] @ w for a, b, w in zip(starts, ends, kernel, strict=True)]
    return jnp.concatenate([*groups, jnp.zeros((len(x) - ends[-1], kernel.shape[2]), x.dtype)])


def scalar(product, x, kernel, sizes):
    return jnp.sum(jnp.sin(product(x, kernel, sizes)))


def second(product, x, kernel, sizes):
    """A scalar of both gradients: its gradient is a second derivative."""
    gradients = jax.grad(scalar, (1, 2))(product, x, kernel, sizes)
    return sum(jnp.sum(jnp.cos(g)) for g in gradients)


def value_and_gradients(product, x, kernel, sizes):
    """The scalar, the product, and gradients by both operands."""

    def outcome(x, kernel):
        y = product(x, kernel, sizes)
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(outcome, (0, 1), has_aux=True)(x, kernel)


compiled = jax.jit(value_and_gradients, static_argnums=0)


@partial(jax.jit, static_argnums=2)
def _by_the_loop(x, kernel, sizes):
    return value_and_gradients(loop, x, kernel, sizes)


def by_the_loop(x, kernel, sizes):
    return _by_the_loop(x, kernel, tuple(map(int, sizes)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_values_and_gradients(implementation, sizes):
    got = compiled(implementation, *operands(), np.int32(sizes))
    close(got, by_the_loop(*operands(), sizes), rtol=1e-5)


@cache
def second_derivatives_by_the_loop(sizes):
    return jax.jit(jax.grad(partial(second, loop, sizes=sizes), (0, 1)))(*operands())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_gradient_of_a_gradient(implementation):
    x, kernel = operands()
    sizes = SIZES["rows past the end"]
    gradient = jax.jit(jax.grad(partial(second, implementation), (0, 1)))
    expected = second_derivatives_by_the_loop(tuple(sizes))
    close(gradient(x, kernel, np.int32(sizes)), expected, 1e-4)


def test_double_precision_against_finite_differences(x64):
    x, kernel = operands(jnp.float64)
    product = jax.jit(partial(grouped_matmul, group_sizes=np.array(SIZES["uneven"])))
    y = product(x, kernel)
    assert y.dtype == jnp.float64
    close(y, loop(x, kernel, SIZES["uneven"]), 1e-14)
    check_gradients(product, x, kernel, order=2)


def test_bfloat16():
    x, kernel = operands(jnp.bfloat16)
    y = jax.jit(grouped_matmul)(x, kernel, np.int32(SIZES["uneven"]))
    exact = loop(np.float32(x), np.float32(kernel), SIZES["uneven"])
    assert y.dtype == jnp.bfloat16
    close(y, exact, 2**-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (None, None, 0), (1, 2, 0)])
def test_vmap_over_any_operand(batched, implementation):
    x, kernel = operands()
    two = [np.stack([a, f(a)]) for a, f in [(x, np.sin), (kernel, np.cos)]]
    two.append(np.int32([SIZES["uneven"], SIZES["rows past the end"]]))
    run = partial(value_and_gradients, implementation)
    arguments = [
        a[0] if axis is None else np.moveaxis(a, 0, axis)
        for a, axis in zip(two, batched, strict=True)
    ]
    result = jax.device_get(jax.jit(jax.vmap(run, batched))(*arguments))
    for i in range(2):
        one = [a[i if axis is not None else 0] for a, axis in zip(two, batched, strict=True)]
        close(jax.tree.map(lambda a: a[i], result), by_the_loop(*one), rtol=1e-5)  # noqa: B023


def test_nested_vmap():
    x, kernel = operands()
    xs, kernels = np.stack([x, np.sin(x)]), np.stack([kernel, np.cos(kernel), -kernel])
    sizes = np.int32(SIZES["uneven"])
    product = jax.vmap(jax.vmap(grouped_matmul, (0, None, None)), (None, 0, None))
    y = jax.jit(product)(xs, kernels, sizes)
    expected = np.stack([[loop(x, k, SIZES["uneven"]) for x in xs] for k in kernels])
    close(y, expected, rtol=1e-5)


def test_scan_and_remat():
    x, kernel = operands()
    xs, sizes = np.stack([x, np.sin(x)]), np.int32(SIZES["uneven"])

    def total(product, kernel):
        step = jax.checkpoint(lambda x: jnp.sum(jnp.sin(product(x, kernel, sizes))))
        return jnp.sum(jax.lax.scan(lambda carry, x: (carry, step(x)), 0, xs)[1])

    gradient = jax.jit(jax.grad(partial(total, grouped_matmul)))(kernel)
    expected = sum(np.asarray(by_the_loop(x, kernel, SIZES["uneven"])[1][1]) for x in xs)
    close(gradient, expected, rtol=1e-5)


def test_forward_mode_is_refused():
    x, kernel = operands()
    product = partial(grouped_matmul, kernel=kernel, group_sizes=jnp.array(SIZES["even"]))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(product, (x,), (x,))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    x, kernel = jax.device_get(operands(rows=rows))
    (_, y), (_, gradient) = compiled(grouped_matmul, x, kernel, np.int32([0, rows, 0, 0]))
    close(y, x @ kernel[1], rtol=1e-5)
    assert gradient.shape == kernel.shape


def test_the_program_does_not_grow_with_the_number_of_groups():
    def lines(groups):
        shapes = [((512, D), jnp.float32), ((groups, D, O), jnp.float32), ((groups,), jnp.int32)]
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        gradient = jax.grad(partial(scalar, grouped_matmul), (0, 1))
        return len(jax.jit(gradient).lower(*arguments).as_text().splitlines())

    assert lines(64) == lines(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((M, D, 1))}, r"x must be \[M, D\]"),
        ({"kernel": jnp.ones((E, D + 1, O))}, "must be the same"),
        ({"group_sizes": jnp.ones((E + 1,), int)}, "must be the same"),
        ({"group_sizes": jnp.ones((E,))}, "integers"),
        ({"kernel": jnp.ones((E, D, O), jnp.bfloat16)}, "one dtype"),
        ({"group_sizes": jnp.array([1, -1, 2, 3])}, "negative"),
        ({"group_sizes": jnp.array([M, 1, 0, 0])}, r"number of rows \(40\)"),
    ],
)
def test_refusals(change, message):
    x, kernel = operands()
    good = {"x": x, "kernel": kernel, "group_sizes": jnp.array(SIZES["even"])}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(good | change))


def test_integers_are_refused():
    x, kernel = jnp.ones((3, 2), jnp.int32), jnp.ones((2, 2, 2), jnp.int32)
    with pytest.raises(ValueError, match="x and kernel must be floats, got int32"):
        grouped_matmul(x, kernel, jnp.array([1, 2]))
