"""Pictures of mixtures, as matplotlib figures.

Every function takes arrays and returns a figure; nothing is shown, saved or kept in global state.
"""

from moejax.plot.boundaries import Plane, boundaries, data, grid
from moejax.plot.specialisation import images_by_expert, specialisation, table
from moejax.plot.style import new_figure
from moejax.plot.training import confusion, curves

__all__ = [
    "Plane",
    "boundaries",
    "confusion",
    "curves",
    "data",
    "grid",
    "images_by_expert",
    "new_figure",
    "specialisation",
    "table",
]
