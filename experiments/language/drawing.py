"""What is drawn and written at the end: curves, specialisation, samples."""

from __future__ import annotations

from pathlib import Path

from language import figures
from language.page import page
from language.report import Runs
from language.runs import Run
from language.sampling import Sample
from parts.output import save_figure, save_text

SHOWN = 400  # characters of a sample in a picture


def draw(out: Path, runs: Runs, samples: dict[str, Sample]) -> None:
    """Writes the pictures and the page of samples."""
    save_figure(figures.curves(runs), out / "curves.png")
    for name, written in samples.items():
        if written.experts is not None:
            draw_experts(out / name, runs[name][0], written)
    html = page({name: (one.characters, one.experts) for name, one in samples.items()})
    save_text(html, out / "samples.html")


def draw_experts(out: Path, run: Run, written: Sample) -> None:
    """Writes the pictures of one mixture: those of its first seed."""
    assert written.experts is not None
    save_figure(figures.balance(run.results["load"]), out / "balance.png")
    save_figure(figures.specialisation(run.results["by_kind"]), out / "kinds.png")
    shown = written.characters[:SHOWN], written.experts[:, :SHOWN]
    save_figure(figures.coloured_text(*shown), out / "text.png")
