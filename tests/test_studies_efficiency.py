"""The study of efficiency: what is counted, a turn, the command."""

import json
from functools import partial

import jax
import pytest

from commands import run
from studies.efficiency_measures import counts, drawn, turn_of
from studies.efficiency_report import cell_name
from studies.heads import DIGITS, EXPERTS, HIDDEN
from studies.sharpness_models import FEATURES, HEADS

NARROW = HIDDEN // EXPERTS
ROUTER = FEATURES * EXPERTS
PRODUCTS = {  # weights that one image meets
    "dense": FEATURES * HIDDEN + HIDDEN * DIGITS,
    "soft": ROUTER + EXPERTS * (FEATURES * NARROW + NARROW * DIGITS),
    "top-2": ROUTER + 2 * (FEATURES * NARROW + NARROW * DIGITS),
    "top-1": ROUTER + FEATURES * NARROW + NARROW * DIGITS,
}
BIASES = {
    "dense": HIDDEN + DIGITS,
    "soft": EXPERTS + EXPERTS * (NARROW + DIGITS),
    "top-2": EXPERTS + 2 * (NARROW + DIGITS),
    "top-1": EXPERTS + NARROW + DIGITS,
}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr("studies.efficiency_measures.TURN", 0.01)


@pytest.mark.parametrize("name", HEADS)
def test_counts_by_hand(name, key):
    head = HEADS[name]
    found = counts(head, jax.eval_shape(head.layer.init, key))
    assert found["operations"] == 2 * PRODUCTS[name]
    assert found["active"] == PRODUCTS[name] + BIASES[name]
    every = "dense" if name == "dense" else "soft"
    assert found["parameters"] == PRODUCTS[every] + BIASES[every]


def test_a_turn_has_a_row_for_each_key():
    measured = turn_of(HEADS["top-1"], 4)(jax.random.split(jax.random.key(0), 2))
    assert {len(values) for values in measured.values()} == {2}
    assert all((values > 0).all() for values in measured.values())
    images = 4 * FEATURES * 4
    assert measured["bytes"][0] >= 4 * measured["parameters"][0] + images


def test_every_key_draws_its_own(key):
    start = jax.jit(partial(drawn, HEADS["top-1"], 4))
    first, again, other = map(start, (key, key, jax.random.key(7)))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    assert all(jax.tree.leaves(same))
    assert not (first[1] == other[1]).any()


def test_the_command_ends_with_tables(tmp_path, capsys):
    page = tmp_path / "studies.md"
    page.write_text("<!-- efficiency -->\n<!-- /efficiency -->\n")
    options = ["--seeds", "1", "--batches", "2", "--no-cache", "--docs", str(tmp_path)]
    run("efficiency", *options, "--out", str(tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["cells"]) == {cell_name(name, 2) for name in HEADS}
    for text in (capsys.readouterr().out, page.read_text()):
        assert "| microseconds per image | batch 2 |" in text
    assert (tmp_path / "out" / "efficiency.png").stat().st_size > 10_000
