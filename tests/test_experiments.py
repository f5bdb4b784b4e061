"""The experiments are users of the library: they import what is public, and nothing else."""

import ast
import importlib
import re

import pytest

import moejax
from commands import EXPERIMENTS

FILES = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.py"))
PUBLIC = {"moejax", "moejax.diagnostics", *moejax._MODULES.values()}


def is_public(module, name):
    """Whether ``from module import name`` takes a public module or a public name of one."""
    if f"{module}.{name}" in PUBLIC:
        return True
    loaded = importlib.import_module(module)
    return module in PUBLIC and name in getattr(loaded, "__all__", dir(loaded))


@pytest.mark.parametrize("file", FILES)
def test_imports_and_attributes_are_public(file):
    nodes = list(ast.walk(ast.parse((EXPERIMENTS / file).read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in modules if name.startswith("moejax.")]
    taken = [
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moejax"
        for alias in node.names
    ]
    assert not [f"{module}.{name}" for module, name in taken if not is_public(module, name)]
    private = [node.attr for node in nodes if isinstance(node, ast.Attribute) and is_private(node)]
    assert not private


def is_private(node):
    """Whether an attribute is ``moejax. ... ._name``."""
    root = node
    while isinstance(root, ast.Attribute):
        root = root.value
    hidden = node.attr.startswith("_") and not node.attr.endswith("__")
    return hidden and isinstance(root, ast.Name) and root.id == "moejax"


def test_the_readme_names_every_script_and_nothing_that_is_not_there():
    readme = (EXPERIMENTS / "README.md").read_text()
    linked = set(re.findall(r"\]\(([\w./]+)\)", readme))
    assert {path.name for path in EXPERIMENTS.glob("*.py")} <= linked
    assert not [name for name in linked if not (EXPERIMENTS / name).exists()]
