"""A method has five places, and no sixth that anyone has to remember."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import flatopt
from tests import cases

ROOT = Path(flatopt.__file__).parent.parent
# Methods of the paper of another, in whose file they stand.
SIBLINGS = {
    "gadamx": "gadam",
    "msam_sgd": "msam",
    "reuse_direction": "looksam",
    "scale_by_hutchinson": "sassha",
}
FAMILIES = (
    "sam",
    "averaging",
    "entropy",
    "replicas",
    "sparse",
    "sphere",
    "curvature",
    "learning_rates",
)


def _family(method: str) -> str | None:
    """The family whose folder holds the file of the method; None if no folder does."""
    file = SIBLINGS.get(method, method)
    return next((f for f in FAMILIES if (ROOT / f"flatopt/_{f}/{file}.py").exists()), None)


def _has_file(method: str) -> bool:
    folder, file = _family(method), SIBLINGS.get(method, method)
    text = (ROOT / f"flatopt/_{folder}/{file}.py").read_text() if folder else ""
    return method in flatopt.methods() and f"def {method}(" in text


def _has_door(method: str) -> bool:
    folder, file = _family(method), SIBLINGS.get(method, method)
    if folder is None or method not in flatopt.__all__:
        return False
    table = (ROOT / f"flatopt/_{folder}/__init__.py").read_text()
    return re.search(rf"^{file} +\S", table, re.MULTILINE) is not None


def _has_case(method: str) -> bool:
    return any(case.factory == method for case in cases.CASES)


def _has_tests(method: str) -> bool:
    path = ROOT / f"tests/{_family(method)}/test_{SIBLINGS.get(method, method)}.py"
    return path.exists() and re.search(rf"\b{method}\b", path.read_text()) is not None


def _has_changelog(method: str) -> bool:
    return f"`{method}" in (ROOT / "CHANGELOG.md").read_text()


PLACES: dict[str, Callable[[str], bool]] = {
    "its file, flatopt/_family/name.py, with @registry.method": _has_file,
    "its lines in flatopt/__init__.py and in the family's __init__.py": _has_door,
    "a Case in tests/cases.py": _has_case,
    "its tests, tests/family/test_name.py": _has_tests,
    "CHANGELOG.md": _has_changelog,
}


def missing(method: str) -> list[str]:
    """The places where a method is missing."""
    return [place for place, is_there in PLACES.items() if not is_there(method)]


def methods() -> set[str]:
    """Public factories of whole methods: what stands in the tables of methods."""
    found = set(flatopt.methods())
    for name in flatopt.__all__:  # What is not entered, but has a file of its name.
        value = getattr(flatopt, name)
        if inspect.isfunction(value) and value.__module__.endswith(f".{name}"):
            found |= {name} & set(cases.public_factories())
    return found


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_method_is_in_its_five_places(method: str):
    assert len(PLACES) == 5
    assert not missing(method), f"{method} is missing in: {'; '.join(missing(method))}"


def test_what_is_nowhere_is_missing_everywhere():
    assert missing("xsam_of_tomorrow") == list(PLACES)


def test_contributing_walks_through_the_five_places():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = re.findall(r"^\d+\. ", text, re.MULTILINE)
    assert len(steps) == len(PLACES)
    for word in (
        "flatopt/_sam/xsam.py",
        "__init__.py",
        "tests/cases.py",
        "test_xsam.py",
        "CHANGELOG",
    ):
        assert word in text


def test_every_method_is_in_the_comparison_and_no_bench_names_an_unknown_group():
    from benchmarks import methods as bench
    from benchmarks.compare.methods import METHODS

    # Its models are not tapped: what needs statistics of layers has a comparison of its own.
    tapped = {m.name for m in flatopt.methods().values() if "stats_fn" in m.needs}
    assert methods() - tapped <= set(METHODS)
    assert {c.bench.group for c in cases.CASES if c.bench} == set(bench.GROUPS)
