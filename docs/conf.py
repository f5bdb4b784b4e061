"""The documentation: ``python -m sphinx -W -b html docs build/site``."""

import moejax

project = "moejax"
author = "The moejax authors"
release = version = moejax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
default_role = "py:obj"  # `top_k` in a docstring is a link to it
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a named tuple's fields are described once
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"

html_theme = "furo"
html_title = f"moejax {release}"
