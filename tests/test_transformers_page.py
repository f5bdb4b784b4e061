"""The table in docs/transformers.md names every family that is tested."""

from pathlib import Path

from transformers_cases import CASES

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"


def test_the_page_names_every_family():
    written = PAGE.read_text().split("<!-- families -->")[1].split("<!-- end of families -->")[0]
    rows = {line.split("|")[1].strip() for line in written.strip().splitlines()[2:]}
    assert rows == set(CASES), "python tests/write_transformers.py"
