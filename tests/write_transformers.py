"""Writes the table of families in docs/transformers.md: ``python tests/write_transformers.py``."""

import ast
import inspect
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))

import pytest

import moejax
from moejax.interop import transformers as published
from test_transformers import compare, torch
from transformers_cases import CASES, config_of

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->"
PIECES = {
    "beside": "with_shared",
    "behind": "gated",
    "choosing": "biased",
    "mixture": "moe",
    "glu_experts": "glu",
}


def functions_of(family):
    """The public functions that a family composes, itself or by its file's other functions."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(family)))
    imported = {
        alias.asname or alias.name: PIECES.get(alias.name, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "moejax.interop.torch"
        for alias in node.names
    }
    local = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    used, left = set(), {family.__name__}
    while left:
        name = left.pop()
        used.add(name)
        if name in local:
            names = {node.id for node in ast.walk(local[name]) if isinstance(node, ast.Name)}
            left |= names - used
    public = {imported[name] for name in used & set(imported)} & set(moejax.__all__)
    return sorted(public - {"Layer", "Routing", "linear", "dropless"})


def error_of(name):
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return compare(name, "float64")


def table():
    yield "| family | what is special | composed of | largest error |"
    yield "|---|---|---|---|"
    for name, case in CASES.items():
        family = published.FAMILIES[config_of(case).model_type]
        functions = ", ".join(f"`{function}`" for function in functions_of(family))
        yield f"| {name} | {case.special} | {functions} | {error_of(name):.0e} |"


def main():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(table()) + "\n" + END + after)


if __name__ == "__main__":
    main()
