"""The methods that the benchmarks measure, each on its base optimiser, and their gradients."""

from collections.abc import Callable
from typing import TypeAlias

import optax

from benchmarks.compare.training import count_gradients
from tests.cases import CASES, Bench, Case

RATE, MOMENTUM, RHO = 0.01, 0.9, 0.05
ADAM_RATE = 1e-3
EMA_DECAY = 0.999
EVERY = 5  # Of the methods that do something once in a while; a turn is a multiple of it.

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs
Build = Callable[[], Optimizer]


def sgd() -> Optimizer:
    """The base optimiser of most methods."""
    return optax.sgd(RATE, momentum=MOMENTUM)


def adamw() -> Optimizer:
    """The base optimiser of Gadam."""
    return optax.adamw(ADAM_RATE)


def _row(case: Case, bench: Bench) -> Build:
    adam = bench.group == "adamw"
    base, rate = (adamw, ADAM_RATE) if adam else (sgd, RATE)
    return lambda: case.build_on(base, rate, **bench.kwargs)


def _groups() -> dict[str, dict[str, Build]]:
    """The rows that `tests/cases.py` names, a group after its base."""
    groups: dict[str, dict[str, Build]] = {}
    for case in CASES:
        if bench := case.bench:
            base = {"adamw": adamw} if bench.group == "adamw" else {"sgd": sgd}
            rows = groups.setdefault(bench.group, dict(base))
            rows[bench.label or case.factory] = _row(case, bench)
    return groups


# The base, then the methods that take turns with it: ratios are of neighbours in time.
GROUPS = _groups()

METHODS: dict[str, Build] = {
    name: build for group in GROUPS.values() for name, build in group.items()
}

# What most users take: measured on every model.
MAIN = [
    "sgd", "sam", "msam", "msam_sgd", "sam every=5", "looksam every=5", "swa",
    "params_ema", "lookahead", "asam", "gsam", "wsam", "local_entropy L=5",
]  # fmt: skip


def base_of(name: str) -> str:
    """The name of the base optimiser of a method: the first one of its group."""
    group = next(group for group in GROUPS.values() if name in group)
    return next(iter(group))


def chosen_groups(names: list[str]) -> dict[str, dict[str, Build]]:
    """The groups, without the methods that are not in `names`; bases stay."""
    groups = {}
    for title, group in GROUPS.items():
        base = next(iter(group))
        own = {name: build for name, build in group.items() if name == base or name in names}
        # A base alone is measured in other groups.
        if len(own) > 1:
            groups[title] = own
    return groups


def gradients_per_step(name: str) -> float:
    """Gradient evaluations a step, counted over four periods of a method."""
    steps = 4 * EVERY
    return count_gradients(METHODS[name](), steps) / steps
