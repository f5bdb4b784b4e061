r"""Formulas as MathML, written when the site is built.

Sphinx's own renderers load MathJax or KaTeX from another server when a page is read. Browsers
draw MathML by themselves, and docutils, which Sphinx is built on, translates TeX to it: no
script, no fonts, no network.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What stands between "log" and "p" is invisible, and browsers set "logp" without a space.
APPLIED = re.compile(r"<mo>&ApplyFunction;</mo>(?=\s*<(?!mo\b))")
BIG = re.compile(r"\\[bB]igg?[lrm]?(?![A-Za-z])")  # \big( and the like, which docutils lacks


def mathml(tex, node, **options):
    """The formula, with a thin space between a function and an argument without brackets."""
    try:
        formula = tex2mathml(BIG.sub("", tex), **options)
    except MathError as error:
        logger.warning("%s in the formula %s", error, tex, location=node)
        return tex
    return APPLIED.sub('<mspace width="0.1667em"></mspace>', formula)


def visit_inline(self, node):
    """``$...$`` or ``:math:`` within a sentence."""
    self.body.append(mathml(node.astext(), node))
    raise nodes.SkipNode


def visit_block(self, node):
    r"""``$$...$$`` or ``.. math::``; where a phone is too narrow, a line breaks at ``\qquad``."""
    parts = [mathml(tex, node, as_block=True) for tex in node.astext().split(r"\qquad")]
    self.body.append(self.starttag(node, "div", CLASS="math") + "".join(parts) + "</div>\n")
    raise nodes.SkipNode


def setup(app):
    """Adds the renderer under the name that ``html_math_renderer`` selects."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
