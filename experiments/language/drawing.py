"""What is drawn and written at the end: curves, specialisation, samples."""

from __future__ import annotations

from pathlib import Path

from language import figures
from language.page import page
from language.report import Runs
from language.runs import Run
from language.sampling import Sample

SHOWN = 400  # characters of a sample in a picture


def draw(out: Path, runs: Runs, samples: dict[str, Sample]) -> None:
    """Writes the pictures and the page of samples."""
    figures.curves(runs).savefig(out / "curves.png")
    for name, written in samples.items():
        if written.experts is not None:
            draw_experts(out / name, runs[name][0], written)
    html = page({name: (one.characters, one.experts) for name, one in samples.items()})
    (out / "samples.html").write_text(html, encoding="utf-8")


def draw_experts(out: Path, run: Run, written: Sample) -> None:
    """Writes the pictures of one mixture: those of its first seed."""
    assert written.experts is not None
    figures.balance(run.results["load"]).savefig(out / "balance.png")
    figures.specialisation(run.results["by_kind"]).savefig(out / "kinds.png")
    shown = written.characters[:SHOWN], written.experts[:, :SHOWN]
    figures.coloured_text(*shown).savefig(out / "text.png")
