"""README and the pages of the documentation: code, links, pictures, tables."""

import re
from pathlib import Path

import jax
import pytest

from benchmarks.render import PAGES, ROOT, render


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_run(page: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    snippets = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, flags=re.MULTILINE | re.DOTALL
    )
    namespace: dict[str, object] = {"__name__": page.stem}
    for snippet, printed in snippets:
        line = text[: text.index(snippet)].count("\n")
        with jax.numpy_rank_promotion("allow"):  # As in a user's own program.
            exec(compile("\n" * line + snippet, str(page), "exec"), namespace)
        found = capsys.readouterr().out
        if printed:
            _assert_says(found, printed)
    if page == ROOT / "README.md":  # It shows an average that is worth its while.
        assert namespace["mean_loss"] < namespace["last_loss"]


def _assert_says(found: str, printed: str) -> None:
    """The words are those of the page, and numbers, most of them per cent, differ by a few."""
    number = r"[-+]?\d+(?:\.\d+)?"
    assert re.sub(number, "#", found.strip()) == re.sub(number, "#", printed.strip())
    values = [[float(n) for n in re.findall(number, text)] for text in (found, printed)]
    for own, shown in zip(*values, strict=True):  # Rounding differs from machine to machine.
        assert abs(own - shown) <= 3, f"{own} is printed, and the page says {shown}"


def test_a_page_that_says_something_else_is_found():
    _assert_says("right: 91.5 %\n", "right: 91 %\n")
    for wrong in ("right: 71 %", "wrong: 91 %"):
        with pytest.raises(AssertionError):
            _assert_says("right: 91.5 %\n", wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text()):
        path = (target[0] or target[1]).split(" ")[0]  # Without a title.
        if not path.startswith(("http://", "https://")):
            assert (page.parent / path).exists(), f"{page.name} names {path}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_those_of_the_results_files(page: Path):
    assert page.read_text() == render(page), "run `python -m benchmarks.render`"


def test_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
