"""Sharpness: products with the Hessian through every schedule, Lanczos, Hutchinson, the command."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import moejax
from cases import (
    EXPERTS,
    ONE_DEVICE,
    RULES,
    SLOT_RULES,
    SLOT_SCHEDULES,
    C,
    D,
    E,
    O,
    T,
    normal,
    params_of,
)
from commands import refusal, run
from mnist_files import write_small_mnist
from studies.hessian import (
    along,
    density,
    hessian_vector,
    hutchinson,
    lanczos,
    rademacher,
    ritz,
)
from studies.images import loaded
from studies.sharpness_report import percent, ratio, sentence
from study_cases import save_no_pictures

pytestmark = pytest.mark.usefixtures("standard_promotion")


def mixture(execute, rule, router):
    """The loss of a small mixture as a function of a row of parameters, and the row."""
    layer = moejax.moe(EXPERTS["mlp"], router, num_experts=E, route=rule, execute=execute)
    x, y = (normal(seed, T, width, dtype=float) for seed, width in ((1, D), (2, O)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), params_of(layer))
    flat, unravel = ravel_pytree(params)
    return lambda flat: jnp.mean((layer.apply(unravel(flat), x)[0] - y) ** 2), flat


def top_2(execute):
    return mixture(execute, RULES["top_2"], moejax.linear(D, E))


def by_product(loss, flat):
    return jax.jit(partial(hessian_vector, loss, flat))


@cache
def product_of_top_2(schedule):
    """The product with the Hessian through a schedule, and the row; in double precision."""
    with jax.enable_x64(True):
        loss, flat = top_2(ONE_DEVICE[schedule])
        return by_product(loss, flat), flat


@pytest.fixture(scope="module")
def full():
    """The whole Hessian of `top_2` through `dense`, in double precision."""
    with jax.enable_x64(True):
        loss, flat = top_2(moejax.dense)
        return np.asarray(jax.jit(jax.hessian(loss))(flat))


@pytest.mark.parametrize("schedule", ONE_DEVICE)
def test_products_are_those_of_the_whole_hessian(schedule, full, x64):
    product, flat = product_of_top_2(schedule)
    vector = np.cos(np.arange(flat.size))
    np.testing.assert_allclose(product(vector), full @ vector, atol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "rule", "router"),
    [
        ("gather_slots", "expert_choice", moejax.linear(D, E)),
        ("mix_slots", "soft_slots", moejax.slots(D, E, C)),
    ],
)
def test_products_through_slots_are_those_of_forward_mode(schedule, rule, router, x64):
    loss, flat = mixture(SLOT_SCHEDULES[schedule], SLOT_RULES[rule], router)
    vector = np.cos(np.arange(flat.size))
    forward = jax.jit(lambda vector: jax.jvp(jax.grad(loss), (flat,), (vector,))[1])
    np.testing.assert_allclose(by_product(loss, flat)(vector), forward(vector), atol=1e-10)


@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
@pytest.mark.parametrize("schedule", [name for name in ONE_DEVICE if name != "dense"])
def test_forward_mode_says_where_it_works(schedule, wrap):
    loss, flat = top_2(ONE_DEVICE[schedule])
    for transformed in (
        lambda flat: jax.jvp(loss, (flat,), (flat,)),
        lambda flat: jax.jvp(jax.grad(loss), (flat,), (flat,)),
        jax.hessian(loss),
    ):
        with pytest.raises(TypeError, match=r"pass `execute=moejax\.dense`"):
            wrap(transformed)(flat)


def test_products_take_pytrees():
    params = {"a": np.array([1.0, 2.0]), "b": np.array(3.0)}
    loss = lambda p: p["b"] * (p["a"] ** 2).sum()  # noqa: E731
    product = by_product(loss, params)(params)
    np.testing.assert_allclose(product["a"], 2 * 3 * params["a"] + 2 * params["a"] * 3)
    np.testing.assert_allclose(product["b"], 2 * (params["a"] ** 2).sum())


@pytest.fixture(scope="module")
def space():
    """A Krylov space of the whole Hessian."""
    product, flat = product_of_top_2("dense")
    with jax.enable_x64(True):
        find = jax.jit(lambda key: lanczos(product, rademacher(key, flat), 14))
        return find(jax.random.key(3))


def test_lanczos_finds_the_largest_eigenvalue(full, space, x64):
    values, vectors = np.linalg.eigh(full)
    found = jax.jit(ritz)(space)
    assert found.values[-1] == pytest.approx(values[-1], rel=0.01)
    assert abs(found.vector @ vectors[:, -1]) == pytest.approx(1, abs=0.01)
    residual = np.linalg.norm(full @ found.vector - found.values[-1] * found.vector)
    np.testing.assert_allclose(found.residual, residual, rtol=1e-6)
    assert abs(values[-1] - found.values[-1]) <= residual


def test_its_basis_is_orthonormal_and_makes_the_hessian_tridiagonal(full, space, x64):
    alpha, beta, basis = space
    np.testing.assert_allclose(basis @ basis.T, np.eye(14), atol=1e-12)
    expected = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    np.testing.assert_allclose(basis @ full @ basis.T, expected, atol=1e-12)


@jax.jit
def ritz_of_diagonal(values):
    return ritz(lanczos(lambda vector: values * vector, jnp.ones(6), 4))


@pytest.mark.parametrize("shift", [0.0, -9.0])  # all positive, and all negative
def test_a_space_that_ends_early_adds_nothing(shift):
    values = np.array([5.0, 5.0, 2.0, 2.0, 2.0, 2.0]) + shift
    found = jax.device_get(ritz_of_diagonal(values))
    np.testing.assert_allclose(found.values[2:] - shift, [2, 5], atol=1e-5)
    np.testing.assert_allclose(found.weights, [0, 0, 2 / 3, 1 / 3], atol=1e-5)
    np.testing.assert_allclose(values * found.vector, (5 + shift) * found.vector, atol=1e-4)
    assert found.residual == 0


def test_hutchinson_estimates_the_trace(full, x64):
    product, flat = product_of_top_2("dense")
    count = 4000
    estimated = jax.jit(lambda key: hutchinson(product, flat, jax.random.split(key, count)))
    estimate = estimated(jax.random.key(4))
    assert estimate.mean == pytest.approx(full.trace(), rel=0.03)
    assert abs(estimate.mean - full.trace()) < 3 * estimate.error
    off_diagonal = full - np.diag(np.diag(full))
    expected = np.sqrt(2 * (off_diagonal**2).sum() / count)
    assert estimate.error == pytest.approx(expected, rel=0.1)


def test_the_density_has_integral_one_and_the_mean_of_the_spectrum(full, x64):
    flat = np.zeros(len(full))
    product = jnp.asarray(full).dot
    low, high = np.linalg.eigvalsh(full)[[0, -1]]
    width = (high - low) / 50
    places = np.linspace(low - 8 * width, high + 8 * width, 2000)

    @jax.jit
    def curve_of(key):
        starts = jax.random.split(key, 200)
        found = jax.lax.map(lambda key: ritz(lanczos(product, rademacher(key, flat), 12)), starts)
        return density(found.values, found.weights, jnp.asarray(places), width)

    curve = curve_of(jax.random.key(5))
    assert np.trapezoid(curve, places) == pytest.approx(1, abs=1e-6)
    mean = np.trapezoid(curve * places, places)
    assert mean == pytest.approx(full.trace() / len(full), rel=0.1)


def test_the_loss_on_a_line():
    square = lambda flat: (flat**2).sum()  # noqa: E731
    line = along(square, np.zeros(2), np.array([0.6, 0.8]), np.arange(3.0))
    np.testing.assert_allclose(line, [0, 1, 4], rtol=1e-6)


OPTIONS = """--heads dense soft --examples 10 --epochs 2 --batch-size 5 --images 5 --starts 2
    --steps 3 --probes 2 --learning-rate 0.01 --no-cache""".split()


def test_the_command_ends_with_tables_and_goes_on(tmp_path, capsys, monkeypatch):
    folder = str(write_small_mnist(tmp_path / "data").folder)
    options = [*OPTIONS, "--data-dir", folder, "--out", str(tmp_path / "out")]
    run("sharpness", "--seeds", "2", *options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    dense, soft = (
        np.array(summary["cells"][name]["test_trace"]["values"]) for name in ("dense", "soft")
    )
    known = (dense > 0) & (soft > 0)
    found = summary["ratios"]["soft"]["test_trace"]["values"]
    np.testing.assert_allclose(found, soft[known] / dense[known], rtol=1e-4)
    assert summary["options"]["the data"].startswith("custom ")
    head = "| head | train, published | train, ours | test, published | test, ours |"
    assert head in capsys.readouterr().out
    assert (tmp_path / "out" / "sharpness.png").stat().st_size > 10_000

    save_no_pictures(monkeypatch)
    page = tmp_path / "studies.md"
    page.write_text("<!-- sharpness -->\n<!-- /sharpness -->\n")
    run("sharpness", "--seeds", "2", *options, "--resume", "--docs", str(tmp_path))
    assert head in page.read_text()
    now = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert now == summary == json.loads((tmp_path / "studies" / "sharpness.json").read_text())

    write_small_mnist(tmp_path / "data", seed=7)
    loaded.cache_clear()  # as in another process
    capsys.readouterr()
    message = refusal("sharpness", *options, "--resume", capsys=capsys)
    assert "the data must be what the run began with" in message


def test_data_that_cannot_be_used_are_refused_in_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--data-dir"]
    message = refusal("sharpness", *out, str(tmp_path / "nowhere"), capsys=capsys)
    assert "nowhere" in message
    folder = str(write_small_mnist(tmp_path / "data").folder)
    message = refusal("sharpness", *out, folder, capsys=capsys)
    assert "--batch-size must be at most the number of training images, 30, got 100" in message


def test_a_sentence_says_which_way():
    each = {
        "train_largest": {"low": 0.5, "high": 0.9},
        "test_largest": {"low": 1.1, "high": 1.9},
        "train_trace": {"low": 0.9, "high": 1.1},
        "test_trace": {"low": None, "high": None},
    }
    assert sentence("soft", each) == (
        "Soft is shown to be sharper than dense by largest eigenvalue (test) and flatter by "
        "largest eigenvalue (train)."
    )
    one_seed = {place: {"low": None, "high": None} for place in each}
    assert sentence("soft", one_seed) == "One seed shows no difference between soft and dense."


def test_shares_have_no_exponent():
    shares = [2.2071e-7, 0.0776, 0.0, 1.234]
    assert [percent(share) for share in shares] == ["0.000022%", "7.8%", "0%", "120%"]


def test_ratios_are_averaged_as_logarithms():
    found = ratio(np.array([2.0, 8.0]), np.array([1.0, 1.0]))
    assert found["mean"] == pytest.approx(4)
    assert found["low"] * found["high"] == pytest.approx(16)
    assert ratio(np.array([3.0]), np.array([2.0]))["low"] is None


def test_ratios_of_numbers_below_zero_are_left_out():
    found = ratio(np.array([-2.0, 2.0, 8.0]), np.array([-4.0, 1.0, 4.0]))
    assert found["values"].tolist() == [2, 2]
    assert found["mean"] == pytest.approx(2)
    none = ratio(np.array([-1.0]), np.array([1.0]))
    assert none["mean"] is None
