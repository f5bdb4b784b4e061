"""Characters to learn a language from: Python's own standard library, or files of your own."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.kinds import kinds_of

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(CHARACTERS)  # the id of every other character
VOCABULARY = UNKNOWN + 1
_IDS = {character: number for number, character in enumerate(CHARACTERS)}


class Text(NamedTuple):
    """Characters to train on and others to validate with.

    Attributes:
        train: ids, uint8 [N].
        validation: ids, uint8 [M], from files that are no part of the training text.
        kinds: kinds of the validation characters, uint8 [M], indices into `data.kinds.KINDS`.
        source: where the text came from, in words.
    """

    train: np.ndarray
    validation: np.ndarray
    kinds: np.ndarray
    source: str


def encode(text: str) -> np.ndarray:
    """The ids of characters, uint8.

    Example:
        >>> encode("a b").tolist()
        [66, 1, 67]
    """
    return np.array([_IDS.get(character, UNKNOWN) for character in text], np.uint8)


def decode(ids: np.ndarray) -> str:
    """The characters of ids; unknown ones become a replacement character.

    Example:
        >>> decode(encode("def é"))
        'def \ufffd'
    """
    return "".join((*CHARACTERS, "\ufffd")[number] for number in ids)


def standard_library() -> Text:
    """The modules of Python's standard library, with a tenth of the files for validation."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(folder.glob("*.py"))
    return from_files(paths, f"{len(paths)} modules of Python's standard library in {folder}")


def from_files(paths: list[Path], source: str) -> Text:
    """Whole files to train on, and a tenth of them, chosen by SHA-256 of their text, to validate.

    So all copies of a file are on the same side. A single file is split at nine tenths of its
    length.

    Raises:
        ValueError: if there is too little text on one side.
        OSError: if a file cannot be read.
    """
    texts = [path.read_text("utf-8", errors="replace").expandtabs(4) for path in paths]
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        train, validation = [texts[0][:cut]], [texts[0][cut:]]
        kinds = kinds_of(texts[0])[cut:]  # of the whole text: the cut may fall inside a string
    else:
        train = [text for text in texts if not _is_held_out(text)]
        validation = [text for text in texts if _is_held_out(text)]
        kinds = np.concatenate([np.zeros(0, np.uint8), *map(kinds_of, validation)])
    return _checked(Text(encode("".join(train)), encode("".join(validation)), kinds, source))


def _is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 26  # of 256


def _checked(text: Text) -> Text:
    least = 1_000
    if min(len(text.train), len(text.validation)) < least:
        raise ValueError(
            f"the text must have at least {least:,} characters to train and as many to validate, "
            f"got {len(text.train):,} and {len(text.validation):,}: give more or longer files"
        )
    return text
