"""Every example in a public docstring runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax

MODULES = sorted(module.name for module in pkgutil.walk_packages(moejax.__path__, prefix="moejax."))
NAMES = {"jax": jax, "jnp": jnp, "moejax": moejax, "np": np, "optax": optax, "partial": partial}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    found = doctest.DocTestFinder().find(module, extraglobs=NAMES)
    for one in found:
        runner.run(one)
    written = re.findall(r"^\s*>>> ", inspect.getsource(module), re.MULTILINE)
    assert sum(len(one.examples) for one in found) == len(written)
    assert runner.failures == 0, f"{runner.failures} examples of {name} print something else"
