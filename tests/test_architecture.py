"""Imports only go down, private modules of others stay private, and the public surface is told."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flatopt

ROOT = Path(flatopt.__file__).parent
# Modules on one floor never import one another, except downwards in the order given here.
FLOORS = [
    ["_tree", "_checks", "_random", "_base", "_functional", "_selection", "_schedules", "_ring"],
    ["_mean"],
    ["_perturbations", "_directions", "_noise", "_sparse", "_combiners", "_eval"],
    ["_langevin", "_replicas"],
    ["_merge", "_inner_state", "_batch_stats"],
    ["_gradient_at", "_reuse_direction", "_arwp", "_hold", "_sampa", "_alternate", "_average"],
    ["_snapshots", "_swag", "_lookahead", "_periodic_swa"],
    ["_local_entropy", "_hold_replicas", "_parle", "_gossip"],
    ["_methods", "_mixed_gradients", "_directed", "_partial", "_gadam", "_ensemble"],
    ["_entropy_sgd", "_replicated", "samplers"],
    ["linen", "nnx"],
]
# On the lowest floor the checks use the tree helpers, and others use both.
ALLOWED_SIDEWAYS = {
    ("_checks", "_tree"),
    ("_base", "_tree"),
    ("_base", "_checks"),
    ("_selection", "_checks"),
    ("_schedules", "_checks"),
}
OPTIONAL = {"flax": {"linen", "nnx"}, "matplotlib": set()}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _floor(module: str) -> int:
    (floor,) = [i for i, modules in enumerate(FLOORS) if module in modules]
    return floor


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_only_go_down(path: Path):
    for name in _imports(path):
        if name.startswith("flatopt."):
            other = name.split(".")[1]
            sideways = (path.stem, other) in ALLOWED_SIDEWAYS
            assert sideways or _floor(other) < _floor(path.stem), f"{path.stem} imports {other}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.stem)
def test_no_private_modules_of_others_and_no_optional_ones(path: Path):
    for name in _imports(path):
        top, *rest = name.split(".")
        assert not (top != "flatopt" and any(part.startswith("_") for part in rest)), name
        if top in OPTIONAL:
            assert path.stem in OPTIONAL[top], f"{path.stem} imports {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_fit_the_head(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_flatopt_imports_neither_flax_nor_matplotlib():
    code = "import flatopt, sys; print(sorted({'flax', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def _public() -> dict[str, object]:
    return {n: v for n, v in vars(flatopt).items() if callable(v) and not n.startswith("_")}


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_docstrings_say_what_they_must(name: str):
    value = _public()[name]
    doc = inspect.getdoc(value)
    if inspect.isclass(value):
        assert "Attributes:" in doc
        return
    for section in ("Args:", "Returns:", "Examples:", "Notes:"):
        assert section in doc, f"{name} lacks {section}"
    assert ">>>" in doc
    for parameter in inspect.signature(value).parameters:
        assert f" {parameter}:" in doc or f"*{parameter}:" in doc, f"{name}: {parameter} untold"


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_names_are_typed(name: str):
    value = _public()[name]
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
