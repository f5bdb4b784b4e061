"""An HTML page of samples, each character in the colour of its expert; it needs no server."""

from __future__ import annotations

from html import escape

import numpy as np

from data.text import decode
from moejax.plot import color

STYLE = (
    "body{font:16px sans-serif;margin:2em;max-width:60em}"
    "pre{background:#f6f6f6;padding:1em;white-space:pre-wrap;font-weight:bold}"
    ".key span{padding:0 .5em;font-weight:bold}"
)


def page(samples: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> str:
    """The page.

    Args:
        samples: for each model a text [S] and the expert of every character by layer [L, S], None
            for a model without experts.

    Returns:
        HTML.
    """
    sections = [_section(name, *sample) for name, sample in samples.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>Who writes which character</title><style>{STYLE}</style>"
        "<h1>Who writes which character</h1><p>Samples of the language models. Hover over a "
        f"character for its expert.</p>{''.join(sections)}</html>\n"
    )


def _section(name: str, characters: np.ndarray, experts: np.ndarray | None) -> str:
    text = decode(characters)
    if experts is None:
        return f"<h2>{escape(name)}</h2><pre>{escape(text)}</pre>"
    layers = [
        f"<h3>layer {number + 1}</h3>{_key(chosen)}<pre>{_spans(text, chosen)}</pre>"
        for number, chosen in enumerate(experts)
    ]
    return f"<h2>{escape(name)}</h2>{''.join(layers)}"


def _key(chosen: np.ndarray) -> str:
    shown = [
        f'<span style="color:{color(expert)}">expert {expert}</span>'
        for expert in np.unique(chosen).tolist()
    ]
    return f'<p class="key">{"".join(shown)}</p>'


def _spans(text: str, chosen: np.ndarray) -> str:
    pairs = zip(text, chosen.tolist(), strict=True)
    return "".join(
        f'<span title="expert {expert}" style="color:{color(expert)}">{escape(character)}</span>'
        for character, expert in pairs
    )
