"""The code of the how-to page runs as it stands, and parts of a batch add up."""

import re

import jax
import numpy as np
import pytest

import moejax
from pages import DOCS, code_of
from reference import close

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_of("howto.md"), names)
    params, x, gradient = names["params"], names["x"], jax.grad(names["biased_loss"], has_aux=True)
    _, routing = gradient(params, np.zeros(8, "f4"), x)
    bias = moejax.update_balance_bias(np.zeros(8, "f4"), routing, rate=1e-3)  # the page's first
    whole, _ = gradient(params, bias, x)
    # The experts of a token do not depend on the other tokens, so parts add up to the whole.
    close(names["gradients"], whole, rtol=1e-4, atol=1e-6)


def test_it_says_what_each_diagnostic_means():
    page = (DOCS / "howto.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    public = {
        name for name in moejax.__all__ if getattr(moejax, name).__module__ == "moejax.diagnostics"
    }
    assert len(public) == 8
    assert public <= explained


def test_quickly_compiled_parameters_are_the_same(key, optimized):
    layer = moejax.moe(moejax.linear(20, 3), moejax.linear(20, 4), num_experts=4)
    options = {"xla_backend_optimization_level": 1}
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(layer.init, compiler_options=options)(key),
        jax.jit(layer.init)(key),
    )
