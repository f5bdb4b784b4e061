"""The library needs jax, numpy and optax alone; a missing extra is named with its command."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = ["flax", "matplotlib", "orbax", "PIL", "safetensors", "sklearn", "torch", "transformers"]

# What is hidden: what needs it, and the package that brings it.
NEEDED = {
    "matplotlib": ("moejax.plot", "matplotlib"),
    "orbax": ("moejax.checkpoint.save(folder, {'w': jnp.ones(1)}, step=1)", "orbax-checkpoint"),
    "safetensors": ("moejax.weights.save(folder + '/file', {})", "safetensors"),
}

TRAINING = """
model = moejax.moe(moejax.mlp(2, 4, 1), moejax.linear(2, 3), num_experts=3,
                   route=partial(moejax.top_k, k=2))
loss = lambda params, x, key: (jnp.mean(model.apply(params, x)[0] ** 2), {})
optimizer = optax.adam(1e-3)
step = moejax.training.train_step(loss, optimizer)
state = moejax.training.init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
state, metrics = jax.jit(step)(state, jnp.ones((5, 2)))
assert moejax.checkpoint.latest(folder) is None
"""


def run_without(hidden, code, folder):
    """Runs code in an interpreter that finds none of the hidden modules."""
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({hidden!r}))"]
    lines += ["import jax, jax.numpy as jnp, moejax, optax", "from functools import partial"]
    lines += [f"folder = {str(folder)!r}", code]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_core_needs_three_packages():
    assert names(PROJECT["dependencies"]) == {"jax", "numpy", "optax"}


def test_mixtures_train_without_any_extra(tmp_path):
    result = run_without(OPTIONAL, TRAINING, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("hidden", NEEDED)
def test_a_missing_package_is_named_with_its_command(hidden, tmp_path):
    code, package = NEEDED[hidden]
    result = run_without([hidden], code, tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert package in last
    extra = re.search(r"pip install 'moejax\[(\w+)\]'", last)[1]
    assert package in names(EXTRAS[extra])
