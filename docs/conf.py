"""How Sphinx makes the site: `make docs`."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _tables
from _mathml import add_math

import flatopt

REPOSITORY = "https://github.com/flatopt/flatopt"

project = "flatopt"
author = copyright = "the flatopt developers"
version = release = flatopt.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
default_role = "py:obj"
exclude_patterns = ["_build"]
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# A signature that says GradFn may mean that of flatopt or that of flatopt.nnx.
suppress_warnings = ["ref.python"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Cost"]
autodoc_member_order = "bysource"
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "flatopt"
html_static_path = ["_static"]
html_css_files = ["flatopt.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": [],
}
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"

# What leads out of docs/ leads into the repository.
_OUTWARDS = re.compile(r"(?<!!)(\[[^\]]*\])\((?:\.\./)+(?!CHANGELOG|CONTRIBUTING)([^)]+)\)")


def read_source(app, docname, content):
    """Fills in the tables and the reference, and turns links that leave the site."""
    text = _tables.fill(content[0]).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    content[0] = _OUTWARDS.sub(rf"\1({REPOSITORY}/blob/main/\2)", text)


def open_cost(app, what, name, obj, options, lines):
    """`Cost: none.` becomes a section like the others, with its text below."""
    for i, line in enumerate(lines):
        if line.startswith("Cost: "):
            lines[i:] = ["Cost:", *(f"  {part.strip()}" for part in [line[6:], *lines[i + 1 :]])]
            return


def write_signature(app, what, name, obj, options, signature, returns):
    """Types by the names that the code has for them."""
    return _tables.signature(obj)


def setup(app):
    """Connects the above."""
    app.connect("source-read", read_source)
    app.connect(
        "include-read", lambda app, path, docname, content: read_source(app, docname, content)
    )
    app.connect("autodoc-process-docstring", open_cost, priority=100)  # Before napoleon.
    app.connect("autodoc-process-signature", write_signature)
    add_math(app)
