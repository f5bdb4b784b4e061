"""The library needs jax, numpy and optax alone; a missing extra is named with its command."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = ["flax", "matplotlib", "orbax", "PIL", "safetensors", "sklearn", "torch", "transformers"]

# What may be missing: what needs it, and the package that brings it.
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

# A module that is None in `sys.modules` is not found: at first all of them, then one at a time.
PROGRAM = f"""
import json, sys
hidden, folder = dict.fromkeys({OPTIONAL!r}), sys.argv[1]
sys.modules.update(hidden)
import jax, jax.numpy as jnp, moejax, optax
from functools import partial
{TRAINING}
for name in hidden:
    del sys.modules[name]
said = {{}}
for name, (code, _) in {NEEDED!r}.items():
    sys.modules[name] = None
    try:
        exec(code)
    except ImportError as error:
        said[name] = f"{{type(error).__name__}}: {{error}}"
    del sys.modules[name]
print(json.dumps(said))
"""


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_core_needs_three_packages():
    assert names(PROJECT["dependencies"]) == {"jax", "numpy", "optax"}


def test_mixtures_train_without_any_extra_and_one_that_is_missing_is_named(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert list(said) == list(NEEDED)
    for name, (_, package) in NEEDED.items():
        assert said[name].startswith("ImportError: ")
        assert package in said[name]
        extra = re.search(r"pip install 'moejax\[(\w+)\]'", said[name])[1]
        assert package in names(EXTRAS[extra])
