"""The reference names everything that is public, once."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent / "docs" / "reference"
TYPES = {"Axes", "Layout", "Loss", "Metrics", "Path", "Save", "StateDict", "Step"}  # aliases
MADE = {"LinenLayer", "NnxLayer"}  # by `to_linen` and `to_nnx`
LISTED = [
    "moejax",
    "moejax.checkpoint",
    "moejax.interop.flax",
    "moejax.interop.torch",
    "moejax.interop.transformers",
    "moejax.plot",
    "moejax.sharding",
    "moejax.training",
]


def described():
    text = "\n".join(page.read_text() for page in PAGES.glob("*.rst"))
    return re.findall(r"^\.\. auto(?:function|class|data):: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_is_described(name):
    public = set(importlib.import_module(name).__all__) - TYPES - MADE - {"FAMILIES"}
    missing = {f"{name}.{one}" for one in public} - set(described())
    assert not missing, f"add {missing} to a page of docs/reference"


def test_nothing_is_described_twice():
    names = described()
    assert len(names) == len(set(names))
    assert len(names) > 100


def test_every_page_is_in_the_contents():
    contents = (PAGES.parent / "index.md").read_text().split()
    pages = {path.relative_to(PAGES.parent) for path in PAGES.parent.rglob("*.[mr][ds]*")}
    named = {str(path.with_suffix("")) for path in pages if path.name != "index.md"}
    assert named <= set(contents), f"add {named - set(contents)} to docs/index.md"
