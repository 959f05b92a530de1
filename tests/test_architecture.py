"""Imports only go down, private modules of others stay private, and the public surface is told."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatopt
from flatopt import plots

ROOT = Path(flatopt.__file__).parent
# What the files of a family share: a paper imports `_core` and these of its own folder, never
# another paper. All that stands lower in the list may be imported by what stands higher.
MECHANISMS = {
    "_sam": ["gradient_at", "ascent", "combiners", "noise"],
    "_averaging": ["running_mean", "ring"],
    "_entropy": ["exponential_scoping"],
    "_replicas": ["replicas"],
    "_sparse": ["densities"],
    "_sphere": ["groups"],
    "_curvature": [],
    "_learning_rates": [],
}
# Recipes: papers that are made of others.
RECIPES = {
    "_averaging.wasam": {"_sam.sam", "_averaging.swa"},
    "_averaging.gadam": {"_averaging.swa"},
    "_averaging.fast_geometric_ensemble": {"_averaging.snapshots"},
    "_entropy.local_entropy": {"_entropy.langevin"},
    "_entropy.entropy_sgd": {"_entropy.local_entropy", "_entropy.langevin"},
    # A method that measures: the one process of Lanczos.
    "_learning_rates.sgd_by_curvature": {"measures._lanczos_rates"},
    "_sphere.fixed_elr": {"_sphere.project_to_sphere"},
    "_replicas.replicated_sgd": {"_replicas.hold_replicas", "_replicas.couple_replicas"},
}
CORE = [
    "registry",
    "tree_math",
    "checks",
    "progress",
    "rng",
    "quantile",
    "batches",
    "grad_fn",
    "eval_params",
    "means",
    "timing",
    "momenta",
    "stage",
    "taps",
    "unfolding",
    "layers",
    "kronecker",
    "layer_statistics",
]
# Inside a package beside the families, from the bottom up; those on one line are strangers.
INSIDE = {
    "measures": [
        ["_variables", "_results", "_kl_inverse", "_kfac_curvature"],
        ["_basis", "_operator"],
        ["_lanczos", "_rises", "_trace", "_sharpness", "_keskar", "_gradients", "_critical"],
        ["_scale_invariance", "_lanczos_rates"],
        ["_eigenvalues", "_density", "_local_energy", "_local_entropy", "_pac_bayes"],
        ["_pac_bayes_bound"],
        ["_pac_bayes_posterior"],
        ["_quantise", "_similarity", "_barrier", "_symmetry"],
        ["_geodesic", "_alignment", "_flips"],
    ],
    "curves": [["_bases"], ["_points"], ["_training", "_evaluation"]],
}
# Modules beside the families look at `_core` alone; adapters for Flax at averages' statistics too.
ADAPTERS = {"linen": {"_averaging.batch_stats"}, "nnx": {"_averaging.batch_stats"}}
OPTIONAL = {
    "equinox": {"equinox"},
    "flax": {"linen", "nnx"},
    "matplotlib": {"plots"},
    "tqdm": {"progress"},
}
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


def _modules_imported(path: Path) -> set[str]:
    """Modules of flatopt that a file imports from, as `folder.file` or `file`."""
    modules = set()
    for name in _imports(path):
        if name.startswith("flatopt."):
            parts = name.split(".")[1:]
            folder = ROOT / parts[0]
            modules.add(".".join(parts[:2]) if folder.is_dir() else parts[0])
    return modules


def _may_import(own: str, other: str) -> bool:
    """Whether the house allows module `own` to import module `other`."""
    folder, _, file = own.rpartition(".")
    other_folder, _, other_file = other.rpartition(".")
    if folder == "_core":
        return other_folder == "_core" and CORE.index(other_file) < CORE.index(file)
    if other_folder == "_core" or other in RECIPES.get(own, ()) or other in ADAPTERS.get(own, ()):
        return True
    if folder in MECHANISMS and other_folder == folder and other_file in MECHANISMS[folder]:
        order = MECHANISMS[folder]
        return file not in order or order.index(other_file) > order.index(file)
    if folder in INSIDE and other_folder == folder:
        level = {name: i for i, names in enumerate(INSIDE[folder]) for name in names}
        return level[other_file] < level[file]
    return False


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_only_go_down(path: Path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for other in _modules_imported(path):
        assert _may_import(own, other), f"{own} imports {other}"


@pytest.mark.parametrize("family", sorted(MECHANISMS))
def test_each_file_of_a_family_stands_in_its_table(family: str):
    """A family's `__init__` holds no code, and names each file."""
    tree = ast.parse((ROOT / family / "__init__.py").read_text())
    assert len(tree.body) == 1
    named = {line.split()[0] for line in ast.get_docstring(tree).splitlines() if line.strip()}
    files = {p.stem for p in (ROOT / family).glob("*.py")} - {"__init__"}
    assert files <= named, f"{family}/__init__.py does not name {sorted(files - named)}"


def test_dir_shows_what_is_public():
    assert {name for name in dir(flatopt) if not name.startswith("__")} == set(flatopt.__all__)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.stem)
def test_no_private_modules_of_others_and_no_optional_ones(path: Path):
    for name in _imports(path):
        top, *rest = name.split(".")
        assert not (top != "flatopt" and any(part.startswith("_") for part in rest)), name
        if top in OPTIONAL:
            assert path.stem in OPTIONAL[top], f"{path.stem} imports {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_fit_the_head(path: Path):
    assert len(path.read_text().splitlines()) <= 380


def _lines_of_code(function: ast.FunctionDef) -> int:
    """Lines of a function with what it holds, without docstrings."""
    docs = sum(
        len(doc.splitlines())
        for node in ast.walk(function)
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node, clean=False))
    )
    return function.end_lineno - function.lineno + 1 - docs


def _functions() -> dict[str, ast.FunctionDef]:
    return {
        f"{path.relative_to(ROOT)}: {node.name}": node
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        for node in (node.body if isinstance(node, ast.ClassDef) else [node])
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_docstrings_are_short(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            assert len(doc.splitlines()) <= 25, node.name


def test_functions_are_short():
    lengths = {name: _lines_of_code(node) for name, node in _functions().items()}
    long = {name: lines for name, lines in lengths.items() if lines > 40}
    assert len(long) <= 8, long
    assert all(lines <= 60 for lines in long.values()), long


def test_importing_flatopt_imports_nothing_optional():
    code = (
        "import flatopt, sys; flatopt.measures.trace; "
        "print(sorted({'flax', 'matplotlib', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


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
        assert "Attributes:" in doc or getattr(value, "_is_protocol", False)
        return
    # What only draws returns nothing that a doctest could print, and costs nothing.
    shown = () if name.startswith("plots.") else ("Examples:", ">>>")
    if shown:
        assert "Notes:" in doc or "Cost:" in doc
    parameters = inspect.signature(value).parameters
    for section in (*(["Args:"] if parameters else []), "Returns:", *shown):
        assert section in doc, f"{name} lacks {section}"
    for parameter in parameters:
        assert re.search(rf"^ *[*\w, ]*\b{parameter}\b[*\w, ]*:", doc, re.M), f"{name}: {parameter}"


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_names_are_typed(name: str):
    value = _public()[name]
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("plots", "matplotlib", "plots"),
        ("linen", "flax", "flax"),
        ("nnx", "flax", "flax"),
        ("equinox", "equinox", "equinox"),
    ],
)
def test_a_missing_extra_is_named(module: str, package: str, extra: str):
    code = f"import sys; sys.modules['{package}'] = None; import flatopt.{module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'flatopt.{module} needs "flatopt[{extra}]"' in result.stderr
