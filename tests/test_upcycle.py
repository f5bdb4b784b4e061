"""The experiment on upcycling, with a few digits."""

import json
import sys

import jax
import numpy as np

import data
import upcycle
from parts.records import versions


def few_digits(_=None):
    digits = data.digits()
    few = lambda split: jax.tree.map(lambda leaf: leaf[:64], split)  # noqa: E731
    return digits._replace(train=few(digits.train), test=few(digits.test), notice="FEW DIGITS")


def test_it_ends_with_a_table_and_a_verdict(tmp_path, monkeypatch, capsys, standard_promotion):
    monkeypatch.setattr(upcycle, "load", few_digits)
    monkeypatch.setattr(upcycle, "NOISE", 100.0)
    options = "--epochs 2 --more-epochs 1 --seeds 1 --batch-size 32 --out"
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *options.split(), str(tmp_path)])
    upcycle.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("dense", "upcycled", "from scratch"))
    assert printed.splitlines()[-3:] == [
        "One seed does not show whether upcycling pays.",
        "",
        "FEW DIGITS",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["options"] == {
        "--seed": "0",
        "--epochs": "2",
        "--more-epochs": "1",
        "--batch-size": "32",
        "seeds": 1,
    }
    assert summary["versions"] == versions()
    curves = {name: np.array(curve) for name, curve in summary["curves"].items()}
    shapes = {name: curve.shape for name, curve in curves.items()}
    ups = dict.fromkeys(("upcycled", "upcycled with noise"), (1, 2))
    assert shapes == {"dense": (1, 3), **ups, "from scratch": (1, 3)}
    np.testing.assert_array_equal(curves["upcycled"][:, 0], curves["dense"][:, 1])
    assert curves["upcycled with noise"][:, 0] != curves["dense"][:, 1]  # so much noise tells
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_verdict_asks_every_seed():
    last = {"dense": np.array([0.5, 0.5]), "from scratch": np.array([0.4, 0.6])}
    better, mixed = np.array([0.7, 0.7]), np.array([0.55, 0.55])
    assert "paid here" in upcycle.verdict({**last, "upcycled with noise": better})
    assert "dense alone" in upcycle.verdict({**last, "upcycled with noise": mixed})
    assert "did not pay" in upcycle.verdict({**last, "upcycled with noise": mixed - 0.3})
