"""Each public name stands on a page, with its documentation, and in the table of its family."""

import importlib
import sys

import pytest

from benchmarks.render import ROOT
from tests import cases

sys.path.insert(0, str(ROOT / "docs"))
_tables = importlib.import_module("_tables")

PAGES = {page: _tables.fill(page.read_text()) for page in sorted((ROOT / "docs").glob("*.md"))}
SITE = "\n".join(PAGES.values())


def _names() -> list[str]:
    modules = ["flatopt", *(f"flatopt.{name}" for name in _tables.MODULES)]
    return [f"{m}.{name}" for m in modules for name in _tables.public(importlib.import_module(m))]


@pytest.mark.parametrize("name", _names())
def test_each_public_name_stands_on_a_page(name: str):
    documented = SITE.splitlines().count
    directives = [f".. {kind}:: {name}" for kind in ("autofunction", "autoclass")]
    assert sum(map(documented, directives)) == 1, f"{name} is documented nowhere, or twice"


def test_each_factory_stands_in_a_table():
    for factory in cases.public_factories():
        assert f"| {{py:func}}`~flatopt.{factory}` |" in SITE, factory


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text().splitlines()
    assert {page.stem for page in PAGES} - {"index"} <= set(index)
