"""Tutorials: every notebook stores its script's cells with their outputs, and every script runs."""

import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest

from commands import start_fork
from mnist_files import write_small_mnist

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "docs" / "tutorials"
SCRIPTS = {path.stem: path for path in TUTORIALS.glob("*.py") if path.stem != "execute"}

# What the first cell of each script says, for a run that takes seconds.
SMALL = {
    "flax_model": {"TRAIN": 64, "STEPS": 2, "BATCH": 4},
    "mnist": {"SGD_STEPS": 1, "EPOCHS": 1, "EXPERTS": 3, "HIDDEN": 8},
    "published_weights": {"TOKENS": 64, "STEPS": 2, "BATCH": 4},
    "toy": {"SAMPLES": 100, "STEPS": 20, "SEEDS": 2},
    "what_routers_learn": {"POINTS": 64, "STEPS": 3, "SEEDS": 2},
    "your_own": {"POINTS": 16, "WAVES": 3, "STEPS": 20},
}

# What a script needs that the tests do not.
NEEDS = {"published_weights": {"torch", "transformers"}}

# Scripts for a process of their own: one imports those, the other sets the number of devices.
ALONE = ["published_weights", "your_own"]

tutorials = pytest.mark.parametrize("name", SCRIPTS)


def notebook(name):
    return nbformat.read(SCRIPTS[name].with_suffix(".ipynb"), as_version=4)


def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def small(name, folder):
    """The script with other values in its first cell of code, written into a folder."""
    text = SCRIPTS[name].read_text()
    for parameter, value in SMALL[name].items():
        line = rf"^{parameter} = .*$"
        text, count = re.subn(line, f"{parameter} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, f"{name}.py must assign {parameter} once"
    script = folder / f"{name}.py"
    script.write_text(text)
    return script


@tutorials
def test_the_notebook_stores_the_cells_of_its_script(name):
    stored, script = notebook(name), jupytext.read(SCRIPTS[name], fmt="py:percent")
    assert cells(stored) == cells(script), f"run: python docs/tutorials/execute.py {name}"


@tutorials
def test_the_notebook_was_run_from_the_top(name):
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for output in outputs(notebook(name))}
    assert kinds & {"stream", "display_data", "execute_result"}
    assert "error" not in kinds
    assert all(output.get("name") != "stderr" for output in outputs(notebook(name)))


@tutorials
def test_pictures_are_small(name):
    pictures = [output.get("data", {}).get("image/png", "") for output in outputs(notebook(name))]
    assert any(pictures)
    assert max(map(len, pictures)) * 3 / 4 < 150_000  # bytes, from base64


@tutorials
def test_sizes_come_first(name):
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags") for cell in code]
    assert tags == [["parameters"], *[None] * (len(code) - 1)]
    assert all(re.fullmatch(r"[A-Z_]+ = .+", line) for line in code[0].source.splitlines())


@tutorials
def test_the_site_shows_it(name):
    assert f"tutorials/{name}" in (ROOT / "docs" / "index.md").read_text().split()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ALONE])
def test_the_script_runs(name, tmp_path, monkeypatch, standard_promotion):
    write_small_mnist(tmp_path / "mnist", train_size=200, test_size=100)
    monkeypatch.setenv("MOEJAX_DATA_DIR", str(tmp_path / "mnist"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # which a script adds to
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(small(name, tmp_path)), run_name="__main__")


@pytest.mark.parametrize("name", ALONE)
def test_the_script_runs_alone(name, tmp_path):
    missing = sorted(library for library in NEEDS.get(name, ()) if find_spec(library) is None)
    if missing and os.environ.get("MOEJAX_REQUIRE_TORCH") != "1":
        pytest.skip(f"{' and '.join(missing)} not installed")
    script, log = small(name, tmp_path), tmp_path / "log"
    script.write_text(f"import warnings\n\nwarnings.simplefilter('error')\n{script.read_text()}")
    process = start_fork(str(script.with_suffix("")), log=log, programs=tmp_path / "programs")
    process.join()
    assert process.exitcode == 0, log.read_text()
