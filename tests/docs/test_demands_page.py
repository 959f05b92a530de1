"""Every test that the list of demands names is there, wherever it stands."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.render import ROOT

PAGE = Path(__file__).parent / "demands.md"


def _tests() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", re.findall(r"^\| (\d+) \|.*$", PAGE.read_text(), re.MULTILINE))
def test_every_demand_names_tests_that_exist(row: str):
    (line,) = re.findall(rf"^\| {row} \|.*$", PAGE.read_text(), re.MULTILINE)
    named = set(re.findall(r"`(test_\w+)`", line))
    assert named, line
    assert named <= _tests(), named - _tests()
