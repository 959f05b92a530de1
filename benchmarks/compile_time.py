"""Seconds to trace, lower and compile a training step of each method over its base optimiser.

    python -m benchmarks.compile_time --json benchmarks/results/compile_time.json

Each repeat compiles new function objects with empty caches, all variants of a model in turn.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import by_hand, models, record, timing
from benchmarks.models import Problem
from benchmarks.step_time import show

DEEP = 24
BASE = "sgd"
FEW = ["sgd", "sam", "msam"]
MORE = [*FEW, "looksam every=5", "swa", "lookahead"]
BY_HAND = ["sam, by hand", "optax.contrib.sam, opaque"]
ONE_GRAPH = "sam_value_and_grad"
PHASES = ("trace", "lower", "compile")

# Name to a model, and the variants that are measured on it.
MODELS: dict[str, tuple[Callable[[], Problem], list[str]]] = {
    "mlp": (models.mlp, [*MORE, "local_entropy L=5", ONE_GRAPH, *BY_HAND]),
    "transformer": (
        functools.partial(models.transformer, layers=2),
        [*MORE, ONE_GRAPH, *BY_HAND],
    ),
    f"mlp{DEEP}": (
        functools.partial(models.mlp, (*DEEP * (64,), models.CLASSES), 8),
        [*FEW, "swa", ONE_GRAPH, *BY_HAND],
    ),
    f"transformer{DEEP}": (
        functools.partial(models.transformer, 64, DEEP, 16, batch_size=2),
        ["sgd", "sam", ONE_GRAPH],
    ),
}
SMALL = ["mlp", "transformer", f"mlp{DEEP}"]


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


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Rows of one model."""
    make, wanted = MODELS[name]
    problem = make()
    makers = by_hand.variants(wanted)
    found: dict[str, dict[str, list[float]]] = {
        variant: {phase: [] for phase in (*PHASES, "total")} for variant in makers
    }
    _time_one(*makers[BASE], problem)  # Warms up what is loaded at first use.
    order = list(makers)
    for _ in tqdm(range(repeats), desc=name, disable=None):
        for variant in order:
            for phase, value in _time_one(*makers[variant], problem).items():
                found[variant][phase].append(value)
        order = order[1:] + order[:1]
    rows = []
    for name, lists in found.items():
        row: dict[str, Any] = {"variant": name}
        row["seconds"] = {phase: timing.summary(values) for phase, values in lists.items()}
        row["over_base"] = {
            phase: timing.ratio(values, found[BASE][phase]) for phase, values in lists.items()
        }
        rows.append(row)
    return {"sizes": problem.sizes, "num_params": models.num_params(problem), "rows": rows}


def _time_one(make_step: Any, init: Any, problem: Problem) -> dict[str, float]:
    carry = jax.eval_shape(init, problem.params)
    step = make_step(lambda params, *batch: problem.loss_fn(params, *batch))
    jax.clear_caches()
    gc.collect()
    seconds = phases(step, carry, problem.batch)
    return {**seconds, "total": sum(seconds.values())}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for title, result in results["models"].items():
        layers = result["sizes"].get("layers") or len(result["sizes"]["widths"]) - 1
        text += [
            f"{title.removesuffix(str(DEEP))} of {layers} layers:",
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
    add(
        "--models",
        default=",".join(SMALL),
        help=f"commas between: {', '.join(MODELS)} (%(default)s)",
    )
    add("--repeats", type=int, help="rounds (5; 2 with --quick)")
    add("--quick", action="store_true", help="the small Transformer only")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    repeats = args.repeats or (2 if args.quick else 5)
    if repeats < 1:
        parser.error("--repeats must be at least 1.")
    chosen = ["transformer"] if args.quick else args.models.split(",")
    for name in chosen:
        if name not in MODELS:
            parser.error(f"--models: {name!r} is none of {', '.join(MODELS)}.")
    results = {name: measure(name, repeats) for name in chosen}
    print("\n".join(lines({"models": results})))
    if args.json:
        record.write(args.json, {"settings": {"repeats": repeats}, "models": results})


if __name__ == "__main__":
    main()
