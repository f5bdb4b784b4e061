"""The study of balance: what each method chooses and keeps, what is measured, the command."""

import json

import jax
import numpy as np
import pytest

import moejax
from cases import normal
from commands import draw_nothing, run
from data import Split
from mnist_files import write_small_mnist
from studies.balance_methods import EXPERTS, METHODS, K
from studies.balance_report import cell_name, verdict
from studies.balance_training import PIXELS, Run, layer, measure

N = 64


@pytest.fixture(scope="module")
def images():
    rows = np.random.default_rng(0).integers(0, 256, (N, 28, 28), dtype=np.uint8)
    return Split(rows, np.arange(N, dtype=np.int32) % 10)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_chosen(name):
    method = METHODS[name]
    logits = normal(0, N, EXPERTS)
    decision = method.rule(method.memory)(logits)
    chosen = np.asarray(method.chosen(decision))
    assert chosen.shape == (N, EXPERTS)
    if name == "expert choice":
        np.testing.assert_array_equal(chosen.sum(axis=0), K * N // EXPERTS)
    elif name.startswith("ReLU"):
        np.testing.assert_array_equal(chosen, logits > 0)
    else:
        np.testing.assert_array_equal(chosen.sum(axis=1), K)


@pytest.mark.parametrize("name", ["balance bias", "ReLU, by 1.2", "ReLU, by 1.02"])
def test_what_a_method_keeps_moves_against_the_load(name):
    method = METHODS[name]
    logits = np.ones((N, EXPERTS), np.float32)
    logits[:, 0] = 5
    after = method.update(method.memory, method.rule(method.memory)(logits))
    if name == "balance bias":
        assert after[0] < 0 < after[-1]
    else:
        assert after > method.memory  # all eight are active, and two are wanted


def test_a_penalty_is_what_the_library_says():
    decision = moejax.top_k(normal(1, N, EXPERTS), k=K)
    expected = 0.1 * moejax.load_balancing_loss(decision)
    assert METHODS["load balancing, 0.1"].penalty(decision, ()) == expected
    assert METHODS["nothing"].penalty(decision, ()) == 0


def test_collapse_is_measured(images):
    method = METHODS["nothing"]
    shapes = jax.eval_shape(layer(method, ()).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    bias = -np.arange(EXPERTS, dtype=np.float32)
    router = {"kernel": np.zeros((PIXELS, EXPERTS), np.float32), "bias": bias}
    params["routed"]["router"] = router
    result = jax.jit(lambda params: measure(method, Run(params, (), ()), images))(params)
    assert result["violation"] == EXPERTS / K - 1  # all images at the first two of eight
    assert (result["experts"], result["left_out"]) == (K, 0)


@pytest.mark.usefixtures("standard_promotion")  # for optax
def test_the_command_ends_with_a_table(tmp_path, capsys, monkeypatch):
    for name in set(METHODS) - {"nothing", "balance bias"}:
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setattr("studies.page.save_figure", draw_nothing)
    write_small_mnist(tmp_path / "data", train_size=100, test_size=50)
    folders = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    page = tmp_path / "studies.md"
    page.write_text("<!-- balance -->\n<!-- /balance -->\n")
    run("balance", "--seeds", "1", "--steps", "20", "--no-cache", "--docs", str(tmp_path), *folders)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["cells"]) == {cell_name(name) for name in METHODS}
    assert summary["options"]["the data"].startswith("custom ")
    printed = capsys.readouterr().out
    assert "| balance bias | 1 |" in printed
    assert "| balance bias | 1 |" in page.read_text()
    assert (tmp_path / "out" / "balance.png").stat().st_size > 10_000


def test_the_verdict_goes_by_the_interval():
    sure, unsure = {"low": -0.5, "high": -0.1}, {"low": -0.5, "high": 0.1}
    differences = {cell_name(name): unsure for name in METHODS} | {"z-loss": sure}
    assert verdict({"differences": differences}) == (
        "Errors below that of nothing: z-loss. Errors above it: none."
    )
    one_seed = {cell_name(name): {"low": None, "high": None} for name in METHODS}
    assert verdict({"differences": one_seed}) == "One seed shows no difference."
