"""The Python snippets of README and docs run as pasted, one namespace a file."""

import ast
import re
from pathlib import Path

import jax
import pytest

from benchmarks.render import PAGES, ROOT, render


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_run(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {"__name__": page.stem}
    for snippet in snippets:
        line = text[: text.index(snippet)].count("\n")
        with jax.numpy_rank_promotion("allow"):  # As in a user's own program.
            exec(compile("\n" * line + snippet, str(page), "exec"), namespace)
    if page == ROOT / "README.md":
        assert len(snippets) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text()):
        path = target[0] or target[1]
        if not path.startswith(("http://", "https://")):
            assert (page.parent / path).exists(), f"{page.name} names {path}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_those_of_the_results_files(page: Path):
    assert page.read_text() == render(page), "run `python -m benchmarks.render`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_named_in_a_page_exist(page: Path):
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)", page.read_text()):
        tree = ast.parse((ROOT / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{page.name} names {file}::{name}, which is not there"
