"""The documentation: ``python -m sphinx -W -b html docs build/site``."""

import sys
from pathlib import Path

import moejax

sys.path.insert(0, str(Path(__file__).parent))  # the two extensions beside this file

project = "moejax"
author = "The moejax authors"
release = version = moejax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_extensions.mathml",
    "_extensions.short_names",
]
exclude_patterns = ["_extensions"]

default_role = "py:obj"  # `top_k` in a docstring is a link to it
nitpicky = True  # a link that leads nowhere is a warning, and a warning is an error
# The site is built without a network, so names of other libraries are no links.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|flax|jax|jaxlib|matplotlib|np|numpy|optax|os|pathlib)\..*"),
    ("py:class", r"Array"),  # jax.Array
]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a named tuple's fields are described once
napoleon_attr_annotations = False  # and their types stand in the signature
python_maximum_signature_line_length = 90  # longer ones have a line for each argument
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"

html_theme = "furo"
html_title = f"moejax {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
