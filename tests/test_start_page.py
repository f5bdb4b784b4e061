"""The first page prints what it says."""

import pytest

from pages import blocks_of, code_of, words_and_numbers

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_it_prints_what_it_says(capsys):
    exec(code_of("start.md"), {})
    words, numbers = words_and_numbers(capsys.readouterr().out)
    said, figures = words_and_numbers("".join(blocks_of("start.md", "text")))
    assert words == said
    # Two thousand steps of training: a machine that rounds in another way ends nearby.
    assert numbers == pytest.approx(figures, rel=0.05, abs=0.01)
