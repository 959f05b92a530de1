"""Memory of a training step of each method over its base optimiser, as the compiler plans it.

    python -m benchmarks.memory --json benchmarks/results/memory.json

Bytes are counted in copies of the parameters. Nothing runs: these numbers do not wobble.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import by_hand, methods, models, record
from benchmarks.models import Problem

# What we call it, and what XLA does.
KINDS = {"temporary": "temp", "argument": "argument", "output": "output"}


def num_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def planned(problem: Problem, tx: methods.Optimizer) -> dict[str, float]:
    """Bytes that the compiler plans for a donated step, and those of the state."""
    step = by_hand.compiled(by_hand.with_flatopt(tx, problem.loss_fn))
    carry = jax.eval_shape(by_hand.init_of(tx), problem.params)
    plan = step.lower(carry, problem.batch).compile().memory_analysis()
    found = {kind: getattr(plan, f"{field}_size_in_bytes") for kind, field in KINDS.items()}
    return {**found, "state": num_bytes(carry[1])}


def measure(problem: Problem, names: list[str]) -> dict[str, Any]:
    """Rows of one model, in copies of its parameters over the base optimiser."""
    copy = num_bytes(problem.params)
    plans: dict[str, dict[str, float]] = {}
    rows = []
    wanted = {n: b for g in methods.chosen_groups(names).values() for n, b in g.items()}
    for name, build in tqdm(wanted.items(), desc=problem.name, disable=None):
        plans[name] = planned(problem, build())
        base = plans[methods.base_of(name)]
        rows.append(
            {
                "method": name,
                "base": methods.base_of(name),
                "bytes": plans[name],
                "copies_over_base": {k: (v - base[k]) / copy for k, v in plans[name].items()},
                "state_copies": plans[name]["state"] / copy,
            }
        )
    return {"sizes": problem.sizes, "parameter_bytes": copy, "rows": rows}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for model, result in results["models"].items():
        text += [
            f"{model}, a copy is {result['parameter_bytes']:,} bytes:",
            "",
            "| method | state | state over base | temporary over base | arguments over base |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in result["rows"]:
            over = row["copies_over_base"]
            cells = (over["state"], over["temporary"], over["argument"])
            text.append(
                f"| {row['method']} | {row['state_copies']:.2f} | "
                # Adding 0.0 takes the sign from a rounded minus zero.
                + " | ".join(f"{round(cell, 2) + 0.0:.2f}" for cell in cells)
                + " |"
            )
        text.append("")
    return text[:-1]


def main() -> None:
    """Measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="mlp,transformer", help="commas between (mlp,transformer)")
    add("--quick", action="store_true", help="the usual methods on the MLP only")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    chosen = ["mlp"] if args.quick else args.models.split(",")
    results = {}
    for name in chosen:
        if name not in models.MODELS:
            parser.error(f"--models: {name!r} is none of {', '.join(models.MODELS)}.")
        names = list(methods.METHODS) if name == "mlp" and not args.quick else methods.MAIN
        results[name] = measure(models.MODELS[name](), names)
    print("\n".join(lines({"models": results})))
    if args.json:
        record.write(args.json, {"models": results})


if __name__ == "__main__":
    main()
