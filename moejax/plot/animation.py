"""Figures, one after another, as a moving picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from moejax._paths import local
from moejax.plot.style import pixels


def save_animation(figures: Iterable[Figure], path: Path, *, milliseconds: int = 120) -> None:
    """Writes an animated GIF that repeats and holds its last frame.

    Args:
        figures: the frames, all of one size; drawn one at a time, so that an iterator needs the
            memory of one figure, and that of the pixels of all frames.
        path: the file to write.
        milliseconds: how long a frame is shown; the last is shown twenty times as long.

    Raises:
        ValueError: if there is no frame.

    Example:
        >>> import tempfile
        >>> from moejax.plot import new_figure
        >>> figures = (new_figure(width=1, height=1)[0] for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_animation(figures, Path(folder, "two.gif"))
    """
    frames = [pixels(figure)[..., :3].copy() for figure in figures]  # [H, W, 3]
    if not frames:
        raise ValueError("An animation needs at least one figure, got none.")
    palette = _palette(Image.fromarray(np.concatenate(frames[:: max(len(frames) // 4, 1)])))
    pictures = [Image.fromarray(frame) for frame in frames]
    first, *rest = (
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
    )
    durations = [milliseconds] * len(rest) + [20 * milliseconds]
    first.save(local(path), "GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _palette(sample: Image.Image) -> Image.Image:
    # One palette for all frames, so that colours do not flicker. It covers thin lines, too, and it
    # has greys of its own, because the nearest of a few colours would be tinted.
    greys = [grey for grey in (*range(0, 252, 4), 255) for _ in range(3)]
    colours = sample.quantize(192, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette(greys + colours[: 3 * 192])
    return palette
