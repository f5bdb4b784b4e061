"""Progress: the items pass through untouched, and what is reported is true."""

import io
import time
from functools import partial

import numpy as np
import pytest

from parts import progress as module
from parts.command_line import say
from parts.compiling import timed
from parts.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_without_a_terminal(capsys):
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    assert list(progress(iter("ab"), "stream")) == ["a", "b"]
    assert list(progress(iter("ab"), "known", total=2)) == ["a", "b"]
    assert list(progress([], "nothing")) == []
    out, err = capsys.readouterr()
    assert out == ""
    starts = [line.split(" in ")[0] for line in err.splitlines()]
    assert starts == ["letters: 3/3", "stream: 2", "known: 2/2", "nothing: 0/0"]


def test_long_work_reports_in_between(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress("abc", "letters"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["letters: 1/3", "letters: 2/3"]
    assert len(lines) == 3


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm", reason="needs tqdm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    assert "letters: 100%" in terminal.getvalue()


def test_a_line_takes_the_place_of_the_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    say("a line")
    assert terminal.getvalue() == "\r\x1b[K"
    assert capsys.readouterr().out == "a line\n"


def test_standard_error_may_be_closed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with module.waiting("nothing"):
        assert list(progress("abc", "letters")) == ["a", "b", "c"]
    say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_plain_lines_on_a_terminal_without_tqdm(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    assert terminal.getvalue().startswith("letters: 3/3 in ")


def test_what_is_done_while_a_program_first_runs_does_not_count():
    done = []

    def work():
        time.sleep(0.3)
        done.append("once")

    program = timed(lambda x: x + 1, work)
    (first, seconds), (second, _) = program(np.zeros(3)), program(np.ones(3))
    assert (first.tolist(), second.tolist()) == ([1, 1, 1], [2, 2, 2])
    assert done == ["once"]
    assert seconds < 0.2


def test_each_call_does_one_thing_while_a_program_runs():
    done = []
    program = timed(lambda x: x + 1, *(partial(done.append, name) for name in "ab"))
    for expected in ("a", "ab", "ab"):
        program(np.zeros(3))
        assert "".join(done) == expected


def test_what_fails_while_a_program_runs_is_raised():
    def work():
        raise ValueError("cannot draw")

    with pytest.raises(ValueError, match="cannot draw"):
        timed(lambda x: x + 1, work)(np.zeros(3))
