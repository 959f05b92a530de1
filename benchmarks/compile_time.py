"""Seconds to trace, lower and compile a training step of each method over its base optimiser.

    python -m benchmarks.compile_time --json benchmarks/results/compile_time.json

Each repeat compiles new function objects with empty caches, all variants of a model in turn.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import by_hand, methods, models, record, timing
from benchmarks.models import Problem
from benchmarks.step_time import show

DEEP = 24
METHODS = ["sgd", "sam", "msam", "looksam every=5", "swa", "lookahead", "local_entropy L=5"]
DEEP_METHODS = ["sgd", "sam", "msam", "swa"]
BASE = "sgd"
PHASES = ("trace", "lower", "compile")


def problems(quick: bool) -> dict[str, tuple[Callable[[], Problem], list[str]]]:
    """Name to a model and the methods that are measured on it."""
    deep_mlp = lambda: models.mlp((64, *(DEEP - 1) * (64,), models.CLASSES), 8)  # noqa: E731
    deep_transformer = lambda: models.transformer(64, DEEP, 16, batch_size=2)  # noqa: E731
    found = {
        "mlp, 5 layers": (models.mlp, METHODS),
        "transformer, 4 layers": (models.transformer, METHODS),
        f"mlp, {DEEP} layers": (deep_mlp, DEEP_METHODS),
        f"transformer, {DEEP} layers": (deep_transformer, DEEP_METHODS),
    }
    if quick:
        return dict(list(found.items())[:2])
    return found


def phases(step: by_hand.Step, carry: Any, batch: Any) -> dict[str, float]:
    """Seconds of each phase; `step` must be new to JAX."""
    began = time.perf_counter()
    traced = by_hand.compiled(step).trace(carry, batch)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    return {
        "trace": after_trace - began,
        "lower": after_lower - after_trace,
        "compile": ended - after_lower,
    }


def measure(make: Callable[[], Problem], names: list[str], repeats: int) -> dict[str, Any]:
    """Rows of one model."""
    found: dict[str, dict[str, list[float]]] = {}
    problem = make()
    for number in tqdm(range(repeats + 1), desc=problem.name, disable=None):
        loss_fn = make().loss_fn  # A new function: nothing that JAX knows already.
        for name, (step, init) in _variants(loss_fn, names).items():
            carry = jax.eval_shape(init, problem.params)
            jax.clear_caches()
            seconds = phases(step, carry, problem.batch)
            seconds["total"] = sum(seconds.values())
            lists = found.setdefault(name, {phase: [] for phase in (*PHASES, "total")})
            if number:  # The first round warms up.
                for phase, value in seconds.items():
                    lists[phase].append(value)
    rows = []
    for name, lists in found.items():
        row: dict[str, Any] = {"variant": name}
        row["seconds"] = {phase: timing.summary(values) for phase, values in lists.items()}
        row["over_base"] = {
            phase: timing.ratio(values, found[BASE][phase]) for phase, values in lists.items()
        }
        rows.append(row)
    return {"sizes": problem.sizes, "num_params": models.num_params(problem), "rows": rows}


def _variants(loss_fn: Any, names: list[str]) -> dict[str, tuple[by_hand.Step, Any]]:
    """The methods and, of the alternatives, those to SAM."""
    found: dict[str, tuple[by_hand.Step, Any]] = {}
    for name in names:
        tx = methods.METHODS[name]()
        found[name] = (by_hand.with_flatopt(tx, loss_fn), by_hand.init_of(tx))
    for other in by_hand.alternatives():
        if other.method == "sam" and other.name != "optax.contrib.sam, transparent":
            found[other.name] = (other.step(loss_fn), other.init)
    return found


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for title, result in results["models"].items():
        text += [
            f"{title}:",
            "",
            "| step | trace, s | lower, s | compile, s | all | all over sgd |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in result["rows"]:
            cells = [f"{row['seconds'][phase]['median']:.3f}" for phase in (*PHASES, "total")]
            text.append(
                f"| {row['variant']} | {' | '.join(cells)} | {show(row['over_base']['total'])} |"
            )
        text.append("")
    return text[:-1]


def main() -> None:
    """Measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--repeats", type=int, help="rounds (5; 2 with --quick)")
    add("--quick", action="store_true", help="the small models only")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    repeats = args.repeats or (2 if args.quick else 5)
    if repeats < 1:
        parser.error("--repeats must be at least 1.")
    results = {
        title: measure(make, names, repeats)
        for title, (make, names) in problems(args.quick).items()
    }
    print("\n".join(lines({"models": results})))
    if args.json:
        record.write(args.json, {"settings": {"repeats": repeats}, "models": results})


if __name__ == "__main__":
    main()
