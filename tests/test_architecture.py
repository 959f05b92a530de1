"""Imports only go down, private modules of others stay private, and the public surface is told."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flatopt
from flatopt import plots

ROOT = Path(flatopt.__file__).parent
# Modules on one floor never import one another, except downwards in the order given here.
FLOORS = [
    [
        "_tree",
        "_checks",
        "_random",
        "_base",
        "_functional",
        "_selection",
        "_schedules",
        "_ring",
        "_quantile",
        "_fisher",
        "_batches",
        "_progress",
    ],
    ["_mean"],
    ["_perturbations", "_directions", "_noise", "_sparse", "_combiners", "_eval"],
    ["_langevin", "_replicas"],
    ["_merge", "_inner_state", "_batch_stats"],
    [
        "_gradient_at",
        "_one_graph",
        "_reuse_direction",
        "_arwp",
        "_hold",
        "_sampa",
        "_alternate",
        "_average",
        "_monitor",
    ],
    ["_snapshots", "_swag", "_lookahead", "_periodic_swa"],
    ["_local_entropy", "_hold_replicas", "_parle", "_gossip"],
    ["_methods", "_mixed_gradients", "_directed", "_partial", "_gadam", "_ensemble"],
    ["_entropy_sgd", "_replicated", "samplers"],
    ["linen", "nnx"],
]
# Beside the tower: these look down to the lowest floor alone, and nothing of the tower at them.
BESIDE = {"measures", "curves", "landscape", "plots"}
# Inside a package, from the bottom up; modules on one line never import one another.
MEASURES = [
    ["_variables", "_results"],
    ["_basis", "_products"],
    ["_lanczos", "_trace", "_sharpness", "_keskar", "_noise", "_gradients"],
    ["_density", "_quantise", "_similarity", "_barrier", "_symmetry"],
    ["_geodesic"],
]
CURVES = [["_bases"], ["_points"], ["_training", "_evaluation"]]
INSIDE = {"measures": MEASURES, "curves": CURVES}
# On the lowest floor the checks use the tree helpers, and others use both.
ALLOWED_SIDEWAYS = {
    ("_checks", "_tree"),
    ("_base", "_tree"),
    ("_base", "_checks"),
    ("_selection", "_checks"),
    ("_schedules", "_checks"),
    ("_batches", "_tree"),
    ("_quantile", "_tree"),
    ("_random", "_tree"),
    ("_fisher", "_tree"),
}
OPTIONAL = {"flax": {"linen", "nnx"}, "matplotlib": {"plots"}, "tqdm": {"_progress"}}
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


def _level(floors: list[list[str]], module: str) -> int:
    (level,) = [i for i, modules in enumerate(floors) if module in modules]
    return level


def _own(path: Path) -> str:
    """The module's name, or that of its package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_only_go_down(path: Path):
    own = _own(path)
    for name in _imports(path):
        if not name.startswith("flatopt."):
            continue
        _, other, *rest = name.split(".")
        told = f"{own}/{path.stem} imports {name}"
        if other == own:
            assert _level(INSIDE[own], rest[0]) < _level(INSIDE[own], path.stem), told
        elif own in BESIDE:
            assert other in FLOORS[0], told
        else:
            sideways = (own, other) in ALLOWED_SIDEWAYS
            assert other not in BESIDE, told
            assert sideways or _level(FLOORS, other) < _level(FLOORS, own), told


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


def test_importing_flatopt_imports_nothing_optional():
    code = (
        "import flatopt, sys; flatopt.measures.trace; "
        "print(sorted({'flax', 'matplotlib', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def _public() -> dict[str, object]:
    modules = {
        "": flatopt,
        "measures.": flatopt.measures,
        "curves.": flatopt.curves,
        "landscape.": flatopt.landscape,
        "plots.": plots,
    }
    return {
        f"{prefix}{name}": value
        for prefix, module in modules.items()
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "").startswith("flatopt")
    }


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_docstrings_say_what_they_must(name: str):
    value = _public()[name]
    doc = inspect.getdoc(value)
    if inspect.isclass(value):
        assert "Attributes:" in doc
        return
    # What only draws returns nothing that a doctest could print, and costs nothing.
    shown = () if name.startswith("plots.") else ("Examples:", ">>>", "Notes:")
    parameters = inspect.signature(value).parameters
    for section in (*(["Args:"] if parameters else []), "Returns:", *shown):
        assert section in doc, f"{name} lacks {section}"
    for parameter in parameters:
        assert f" {parameter}:" in doc or f"*{parameter}:" in doc, f"{name}: {parameter} untold"


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_names_are_typed(name: str):
    value = _public()[name]
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
