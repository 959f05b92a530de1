"""Tables and reference pages, made from `tests/cases.py`, the docstrings and the public names.

A page says `<!-- methods: sam -->` for the table of a family, `<!-- pieces: sam -->` for that of
what its methods consist of, `<!-- reference: sam -->` for the documentation of its names, and
`<!-- names -->` for the list of all. A new method appears on all of them by itself.
"""

import ast
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator

import flatopt
from flatopt._core import registry
from tests import cases

# The folder of a function's file says its family; a heading says what the family is.
FAMILIES = {
    "core": "Gradients and evaluation",
    "sam": "The SAM family",
    "averaging": "Averages",
    "entropy": "Local entropy",
    "replicas": "Replicas",
    "sparse": "Sparse training",
    "sphere": "The sphere",
    "curvature": "Curvature",
    "learning_rates": "Learning rates",
    "monitoring": "Watching a run",
}
PAGES = {"core": "concepts", "monitoring": "measures"}
MODULES = ["measures", "curves", "landscape", "plots", "linen", "nnx", "equinox", "samplers"]
MODULE_PAGES = {
    "landscape": "curves",
    "plots": "curves",
    "linen": "loops",
    "nnx": "loops",
    "equinox": "loops",
} | {"samplers": "replicas"}
PIECES = {"perturbation", "direction", "combiner"}
_MARK = re.compile(r"<!-- (methods|pieces|reference|names)(?:: (\w+))? -->")


def fill(page: str) -> str:
    """The text of a page with every mark replaced by what it asks for."""
    makers = {"methods": methods, "pieces": pieces, "reference": reference, "names": names}
    return _MARK.sub(lambda m: makers[m[1]](*filter(None, [m[2]])), page)


def public(module: types.ModuleType) -> dict[str, typing.Any]:
    """The public functions and classes of a module, in the order of its file."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and getattr(value, "__module__", "").startswith(
            "flatopt." if module.__name__ in _packages() else module.__name__
        )
    }


def family(value: typing.Any) -> str:
    """The family of a public function or class: `flatopt._sam.gsam` is of `sam`."""
    return value.__module__.split(".")[1].lstrip("_")


def of_family(name: str) -> dict[str, typing.Any]:
    """The public names of one family, functions first; or those of a public module."""
    if name in MODULES:
        found = public(importlib.import_module(f"flatopt.{name}"))
    else:
        found = {n: value for n, value in public(flatopt).items() if family(value) == name}
    return dict(sorted(found.items(), key=lambda item: (inspect.isclass(item[1]), _file(item[1]))))


def methods(name: str) -> str:
    """The table of the methods of a family."""
    return _table(c for c in _first_cases(name) if c.kind not in PIECES)


def pieces(name: str) -> str:
    """The table of the perturbations, directions and combiners of a family."""
    return _table(c for c in _first_cases(name) if c.kind in PIECES)


def reference(name: str) -> str:
    """Autodoc of the public names of a family or of a module."""
    prefix = f"flatopt.{name}." if name in MODULES else "flatopt."
    lines = ["```{eval-rst}"]
    for public_name, value in of_family(name).items():
        lines += list(_directive(prefix + public_name, value))
    return "\n".join([*lines, "```"]) + "\n"


def names() -> str:
    """Every public name with its first line, by family and module."""
    lines = []
    for name, title in FAMILIES.items():
        lines += [f"## {title}", "", f"Page: {{doc}}`{PAGES.get(name, name)}`", ""]
        lines += [*_list("flatopt.", of_family(name)), ""]
    for name in MODULES:
        lines += [f"## `flatopt.{name}`", "", f"Page: {{doc}}`{MODULE_PAGES.get(name, name)}`", ""]
        lines += [*_list(f"flatopt.{name}.", of_family(name)), ""]
    return "\n".join(lines)


def signature(value: typing.Any) -> tuple[str, str | None]:
    """A function's arguments and result as its file writes them; of a class its name is enough."""
    if inspect.isclass(value):
        return "", None
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    arguments.args = [a for a in arguments.args if a.arg not in ("self", "cls")]
    returns = ast.unparse(function.returns) if function.returns else None
    return f"({ast.unparse(arguments)})", returns


def _packages() -> set[str]:
    return {"flatopt", "flatopt.measures", "flatopt.curves"}


def _file(value: typing.Any) -> str:
    """Pieces that papers share come before the papers, and papers by name."""
    return "" if not inspect.isfunction(value) else value.__module__


def _first_cases(name: str) -> Iterator[cases.Case]:
    """One case for each public factory of the family, in the order of `tests/cases.py`."""
    done = set()
    for case in cases.CASES:
        if case.factory not in done and family(getattr(flatopt, case.factory)) == name:
            done.add(case.factory)
            yield case


def _table(rows: Iterable[cases.Case]) -> str:
    rows = list(rows)
    whole = any(case.kind not in PIECES for case in rows)  # A piece takes no gradient itself.
    formulas = any(getattr(case, "formula", "") for case in rows)
    head = ["method" if whole else "piece", "what it does"]
    head += ["formula"] * formulas + ["cost"] + ["`grad_fn`"] * whole
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for case in rows:
        function = getattr(flatopt, case.factory)
        formula = getattr(case, "formula", "")
        cells = [f"{{py:func}}`~flatopt.{case.factory}`", _summary(function)]
        cells += [f"${formula}$" if formula else ""] * formulas
        cells += [_cost(function, case)]
        if whole:
            method = flatopt.methods().get(case.factory)
            needs = case.needs_grad_fn if method is None else "grad_fn" in method.needs
            cells.append("yes" if needs else "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summary(value: typing.Any) -> str:
    """The first line of a docstring."""
    return _to_markdown((inspect.getdoc(value) or "").split("\n\n")[0])


def _to_markdown(text: str) -> str:
    """One line of a docstring, for a cell of a table."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(text.split()))
    return text.replace(r"\|", r"\Vert ").replace("|", r"\|")


def _cost(function: Callable[..., typing.Any], case: cases.Case) -> str:
    """The docstring's own line, or what the tests count."""
    if told := registry.cost_of(function):
        return _to_markdown(told).rstrip(".")
    gradients, copies = case.extra_evaluations / 10, f"{max(case.copies, 0):g} copies"
    if case.kind in PIECES:
        return copies
    return f"{gradients:g} extra gradient{'' if gradients == 1 else 's'}; {copies}"


def _directive(name: str, value: typing.Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f".. autoclass:: {name}"
        methods = [n for n, v in vars(value).items() if inspect.isfunction(v) and n[0] != "_"]
        if methods:
            yield f"   :members: {', '.join(methods)}"
    else:
        yield f".. autofunction:: {name}"
    yield ""


def _list(prefix: str, found: dict[str, typing.Any]) -> list[str]:
    return [f"- {{py:obj}}`~{prefix}{name}`: {_summary(value)}" for name, value in found.items()]
