"""Formulas as MathML, which browsers draw themselves: no script, no font, no network."""

import re

from docutils import nodes
from latex2mathml.converter import convert

_TEXT = re.compile(r"\\text(?:tt)?\{[^}]*\}")
# Browsers follow the style, not the attribute of old.
_ALIGN = re.compile(r'columnalign="(\w+)"')


def to_mathml(tex: str, display: str) -> str:
    """MathML of a formula; one of several lines is aligned at `&`."""
    tex = re.sub(r"\s*\n\s*", " ", tex.strip())
    tex = _TEXT.sub(lambda m: m[0].replace(r"\_", "_"), tex)
    if display == "block" and r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{align*}} {tex} \end{{align*}}"
    return _ALIGN.sub(r'style="text-align: \1"', convert(tex, display=display))


def _inline(translator, node) -> None:
    translator.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator, node) -> None:
    translator.body.append(f'<div class="formula">{to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def add_math(app) -> None:
    """Makes `html_math_renderer = "mathml"` known."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
