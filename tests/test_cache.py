"""The cache of compiled programs: whose they are, and what a damaged one costs."""

import subprocess
import sys
import warnings

import pytest

from commands import EXPERIMENTS
from parts import cache

START = f"""
import os, sys
sys.path.insert(0, {str(EXPERIMENTS)!r})
from parts.cache import keep_programs, sign_programs

def compute(wanted):
    keep_programs(wanted)
    import jax
    print(jax.jit(lambda x: x * 2 + 1)(20.0).item(), flush=True)
"""
ENDED = "compute(True)"
KILLED = """
compute(True)
sign_programs()
os._exit(0)
"""
OFF_THEN_UNWRITABLE = """
compute(False)
os.environ["MOEJAX_CACHE_DIR"] += "/file"
compute(True)
import jax
assert jax.config.jax_compilation_cache_dir is None
"""


def output(code, monkeypatch, folder):
    """What a program prints with the cache in a folder, warnings being errors."""
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(folder))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    command = [sys.executable, "-W", "error", "-c", START + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def all_signed(programs):
    """Whether each program has its SHA-256 beside it."""
    return all(cache.signature(path).read_text() == cache.digest(path) for path in programs)


def test_a_killed_run_keeps_its_programs_and_a_damaged_one_is_compiled_again(tmp_path, monkeypatch):
    assert output(KILLED, monkeypatch, tmp_path) == "41.0\n"
    assert all_signed(tmp_path.rglob("*-cache"))
    programs = [path for path in tmp_path.rglob("*-cache") if path.stat().st_size > 100]
    assert programs
    for path in programs:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    cache.signature(programs[0]).unlink()  # left by a run that was killed
    assert output(ENDED, monkeypatch, tmp_path) == "41.0\n"
    assert all_signed(programs)


def test_a_cache_that_is_off_or_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert output(OFF_THEN_UNWRITABLE, monkeypatch, tmp_path) == "41.0\n" * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_cache_whose_entries_cannot_be_written_says_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache.ignore_complaints()
        for what in ("reading", "writing"):
            warnings.warn(f"Error {what} persistent compilation cache entry for 'f'", stacklevel=1)
    assert not said


@pytest.mark.parametrize("change", ["processor_features", "versions"])
def test_programs_of_another_processor_or_version_are_elsewhere(change, monkeypatch):
    before = cache.programs_folder()
    if change == "versions":
        monkeypatch.setattr(cache.metadata, "version", lambda package: "0.0")
    else:
        monkeypatch.setattr(cache, change, lambda: "another")
    assert cache.programs_folder() != before
