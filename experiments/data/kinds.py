"""What kind of character each character of a Python source is."""

from __future__ import annotations

import io
import keyword
import tokenize

import numpy as np

KINDS = (
    "indentation",
    "space",
    "newline",
    "letter",
    "digit",
    "punctuation",
    "keyword",
    "string",
    "comment",
)
_NUMBER = {name: number for number, name in enumerate(KINDS)}


def kinds_of(text: str) -> np.ndarray:
    """The kind of every character, an index into `KINDS`.

    Args:
        text: a source file; where it is not Python, keywords, strings and comments stay letters.

    Returns:
        Kinds, uint8 [number of characters].

    Example:
        >>> [KINDS[kind] for kind in kinds_of("if x:")]
        ['keyword', 'keyword', 'space', 'letter', 'punctuation']
    """
    kinds = np.array([_of_character(character) for character in text], np.uint8)
    starts = _line_starts(text)
    _indentation(text, starts, kinds)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            kind = _of_token(token)
            if kind is not None:
                first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
                kinds[first:last] = kind
    except (tokenize.TokenError, SyntaxError):
        pass  # what was recognised up to here stays
    return kinds


# From Python 3.12 on an f-string is several tokens, and from 3.14 on so is a t-string.
_PARTS = [f"{letter}STRING_{part}" for letter in "FT" for part in ("START", "MIDDLE", "END")]
_STRINGS = [getattr(tokenize, name) for name in ["STRING", *_PARTS] if hasattr(tokenize, name)]
_KINDS = dict.fromkeys(_STRINGS, _NUMBER["string"]) | {tokenize.COMMENT: _NUMBER["comment"]}


def _of_character(character: str) -> int:
    if character == "\n":
        return _NUMBER["newline"]
    if character.isspace():
        return _NUMBER["space"]
    if character.isalpha() or character == "_":
        return _NUMBER["letter"]
    return _NUMBER["digit" if character.isdigit() else "punctuation"]


def _of_token(token: tokenize.TokenInfo) -> int | None:
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return _NUMBER["keyword"]
    return _KINDS.get(token.type)


def _line_starts(text: str) -> list[int]:
    lengths = [len(line) for line in text.split("\n")]
    return [0, *(np.cumsum(np.array(lengths) + 1)).tolist()]


def _indentation(text: str, starts: list[int], kinds: np.ndarray) -> None:
    for start, line in zip(starts, text.split("\n"), strict=False):
        kinds[start : start + len(line) - len(line.lstrip(" "))] = _NUMBER["indentation"]
