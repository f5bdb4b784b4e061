r"""Formulas as MathML, written when the site is built.

Sphinx's own renderers load MathJax or KaTeX from another server when a page is read. Browsers
draw MathML by themselves, and docutils, which Sphinx is built on, translates TeX to it: no
script, no fonts, no network.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def visit_inline(self, node):
    """``$...$`` or ``:math:`` within a sentence."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node):
    """``$$...$$`` or ``.. math::`` on a line of its own."""
    formula = tex2mathml(node.astext(), as_block=True)
    self.body.append(self.starttag(node, "div", CLASS="math") + formula + "</div>\n")
    raise nodes.SkipNode


def setup(app):
    """Adds the renderer under the name that ``html_math_renderer`` selects."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
