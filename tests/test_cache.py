"""The cache of compiled programs: whose they are, and what a damaged one costs."""

import subprocess
import sys

import pytest

from commands import EXPERIMENTS
from parts import cache

PROGRAM = """
import sys
sys.path.insert(0, {experiments!r})
from parts.cache import keep_programs, programs_folder
keep_programs({wanted})
import jax
print(jax.jit(lambda x: x * 2 + 1)(20.0).item())
"""


def compute(monkeypatch, folder, wanted=True):
    """The output of a program with the cache in a folder, warnings being errors."""
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(folder))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code = PROGRAM.format(experiments=str(EXPERIMENTS), wanted=wanted)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_damaged_program_costs_a_compilation_and_nothing_else(tmp_path, monkeypatch):
    assert compute(monkeypatch, tmp_path) == "41.0\n"
    programs = [path for path in tmp_path.rglob("*-cache") if path.stat().st_size > 100]
    assert programs
    assert all(cache.signature(path).exists() for path in programs)
    for path in programs:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    cache.signature(programs[0]).unlink()  # left by a run that was killed
    assert compute(monkeypatch, tmp_path) == "41.0\n"
    assert all(cache.signature(path).read_text() == cache.digest(path) for path in programs)


def test_a_cache_that_is_off_or_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    assert compute(monkeypatch, tmp_path, wanted=False) == "41.0\n"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert compute(monkeypatch, tmp_path / "file") == "41.0\n"


def test_a_run_that_is_killed_keeps_what_it_compiled(tmp_path, monkeypatch):
    killed = "\nimport os, parts.cache\nparts.cache.sign_programs()\nos._exit(0)"
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", PROGRAM + killed)
    compute(monkeypatch, tmp_path)
    programs = list(tmp_path.rglob("*-cache"))
    assert programs
    assert all(cache.signature(path).read_text() == cache.digest(path) for path in programs)


@pytest.mark.parametrize("change", ["processor_features", "versions"])
def test_programs_of_another_processor_or_version_are_elsewhere(change, monkeypatch):
    before = cache.programs_folder()
    if change == "versions":
        monkeypatch.setattr(cache.metadata, "version", lambda package: "0.0")
    else:
        monkeypatch.setattr(cache, change, lambda: "another")
    assert cache.programs_folder() != before
