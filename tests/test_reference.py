"""The reference names everything that is public, once, and says it by an example."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent / "docs" / "reference"
TABLE = {"FAMILIES"}
ALIASES = {"Axes", "Layout", "Loss", "Metrics", "Path", "Save", "StateDict", "Step"}
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
UNLISTED = {  # public names of modules whose other names are not
    "moejax.base": ["Expert", "Rule", "Schedule"],
    "moejax.interop.safetensors": ["load", "save"],
}
PUBLIC = {name: importlib.import_module(name).__all__ for name in LISTED} | UNLISTED


def described():
    text = "\n".join(page.read_text() for page in PAGES.glob("*.rst"))
    kinds = "auto(?:function|class|data)|data"
    return re.findall(rf"^\.\. (?:{kinds}):: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_described(name):
    missing = {f"{name}.{one}" for one in PUBLIC[name]} - set(described())
    assert not missing, f"add {missing} to a page of docs/reference"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    module = importlib.import_module(name)
    names = set(PUBLIC[name]) - ALIASES - TABLE
    missing = [one for one in names if ">>>" not in getattr(module, one).__doc__]
    assert not missing, f"give the docstrings of {missing} an example"


def test_nothing_is_described_twice():
    names = described()
    assert len(names) == len(set(names))
    assert len(names) > 100


def test_every_page_is_in_the_contents():
    contents = (PAGES.parent / "index.md").read_text().split()
    pages = {path.relative_to(PAGES.parent) for path in PAGES.parent.rglob("*.[mr][ds]*")}
    named = {str(path.with_suffix("")) for path in pages if path.name != "index.md"}
    assert named <= set(contents), f"add {named - set(contents)} to docs/index.md"
