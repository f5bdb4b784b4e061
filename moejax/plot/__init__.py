"""Pictures of mixtures, as matplotlib figures.

Every function takes arrays and returns a figure; nothing is shown, saved or kept in global state.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Pictures need matplotlib, which is not installed: pip install 'moejax[experiments]'."
    ) from error

from moejax.plot._plane import Plane
from moejax.plot.animation import save_animation
from moejax.plot.boundaries import boundaries, boundary_frame, boundary_frames, data, grid
from moejax.plot.diagnostics import diagnostics
from moejax.plot.specialisation import images_by_expert, specialisation, table
from moejax.plot.style import color, new_figure
from moejax.plot.training import confusion, curves, loss

__all__ = [
    "Plane",
    "boundaries",
    "boundary_frame",
    "boundary_frames",
    "color",
    "confusion",
    "curves",
    "data",
    "diagnostics",
    "grid",
    "images_by_expert",
    "loss",
    "new_figure",
    "save_animation",
    "specialisation",
    "table",
]
