"""Time of a jitted training step of each method over its base optimiser.

    python -m benchmarks.step_time --models mlp --json benchmarks/results/step_time_mlp.json

Next to each method, in the same rounds of one run, stand what a user would write by hand, what
optax offers and, with `--peers`, what PyTorch users take.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import by_hand, methods, models, peers, record, timing
from benchmarks.models import Problem

QUICK_METHODS = ["sam", "msam", "looksam every=5", "swa", "params_ema", "lookahead"]


def measure(
    problem: Problem, names: list[str], repeats: int, steps: int, worker: peers.Worker | None = None
) -> dict[str, Any]:
    """Measures methods on one model; what the results file says of it."""
    groups = methods.chosen_groups(names)
    result: dict[str, Any] = {
        "sizes": problem.sizes,
        "num_params": models.num_params(problem),
        "peer_errors": {},
    }
    available: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if worker is not None:
            try:
                loss = float(jax.jit(problem.loss_fn)(problem.params, *problem.batch))
                answer = worker.load(problem, Path(folder))
                result["loss"] = {"flatopt": loss, "peers": answer["loss"]}
                result["peer_versions"], result["peer_threads"] = (
                    answer["versions"],
                    answer["threads"],
                )
                available = _try_peers(worker, list(peers.PEERS), result["peer_errors"])
            except peers.PeerError as error:
                result["peer_errors"]["all"] = str(error)
        rows: dict[str, dict[str, Any]] = {}
        for title, group in groups.items():
            for name, row in _measure_group(
                title, group, problem, repeats, steps, worker, available
            ).items():
                rows.setdefault(name, row)
    result["rows"] = list(rows.values())
    return result


def _try_peers(worker: peers.Worker, names: list[str], errors: dict[str, str]) -> dict[str, float]:
    """Passes a step of those that can take some; why not, of the others, goes into `errors`."""
    available = {}
    for name in names:
        try:
            available[name] = worker.passes_per_step(name, peers.SETTINGS)
        except peers.PeerError as error:
            errors[name] = str(error)
    return available if peers.BASE in available else {}


def _measure_group(
    title: str,
    group: dict[str, methods.Build],
    problem: Problem,
    repeats: int,
    steps: int,
    worker: peers.Worker | None,
    available: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """Rows of a base, its methods and what stands beside them, from turns in one another's time."""
    base = next(iter(group))
    turns: dict[str, timing.Turn] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, turn: timing.Turn, **about: Any) -> None:
        turns[name] = turn
        rows[name] = {"variant": name, **about}

    def ours(name: str, method: str, library: str, step: Any, init: Any) -> None:
        carry = by_hand.fresh_carry(init, problem.params)
        program = by_hand.compiled(step).lower(carry, problem.batch).compile()
        turn = timing.turn_of(program, carry, problem.batch)
        count = methods.gradients_per_step(method)
        add(name, turn, method=method, library=library, base=base, gradients_per_step=count)

    for name, build in group.items():
        tx = build()
        step = by_hand.with_flatopt(tx, problem.loss_fn)
        ours(name, name, "flatopt", step, by_hand.init_of(tx))
    for other in by_hand.alternatives():
        if other.method in group:
            library = other.name if other.name.startswith("optax") else "by hand"
            library = "flatopt" if other.name == "sam_value_and_grad" else library
            ours(other.name, other.method, library, other.step(problem.loss_fn), other.init)
    beside = [name for name in available if peers.PEERS[name] in group]
    if worker is not None and any(name != peers.BASE for name in beside):
        for name in beside:
            turn = worker.turn_of(name, peers.SETTINGS)
            add(
                f"PyTorch {name}",
                turn,
                method=peers.PEERS[name],
                library="PyTorch",
                base=f"PyTorch {peers.BASE}",
                gradients_per_step=available[name],
            )

    with tqdm(
        total=(repeats + 1) * len(turns), desc=f"{problem.name}: {title}", disable=None
    ) as bar:
        seconds = timing.interleaved_seconds(turns, repeats, steps, bar.update)
    for name, row in rows.items():
        row["milliseconds"] = timing.summary([1e3 * s for s in seconds[name]])
        row["over_base"] = timing.ratio(seconds[name], seconds[row["base"]])
        if name != row["method"]:
            row["flatopt_over_it"] = timing.ratio(seconds[row["method"]], seconds[name])
    return rows


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for model, result in results["models"].items():
        text += [
            f"{model}, {result['num_params']:,} parameters:",
            "",
            "| step | gradients | ms | over its base | flatopt over it |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in result["rows"]:
            beside = row.get("flatopt_over_it")
            text.append(
                f"| {row['variant']} | {row['gradients_per_step']:g} "
                f"| {row['milliseconds']['median']:.2f} | {show(row['over_base'])} "
                f"| {show(beside) if beside else ''} |"
            )
        if result.get("peer_versions"):
            versions = ", ".join(f"{k} {v}" for k, v in result["peer_versions"].items())
            text += ["", f"PyTorch's side: {versions}, threads: {result['peer_threads']}."]
        slower = [
            f"{row['method']} than {row['variant']} ({row['flatopt_over_it']['median']:.2f}x)"
            for row in result["rows"]
            if row["library"] != "flatopt"
            and round(row.get("flatopt_over_it", {"median": 0})["median"], 2) > 1
        ]
        text += ["", f"Slower here: {'; '.join(slower) or 'none'}.", ""]
        for name, error in result["peer_errors"].items():
            text += [f"Did not run: {name}: {error}", ""]
    return text[:-1]


def show(r: dict[str, float], digits: int = 2) -> str:
    """A median and its range."""
    return f"{r['median']:.{digits}f} [{r['min']:.{digits}f}, {r['max']:.{digits}f}]"


def main() -> None:
    """Measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", help=f"commas between: {', '.join(models.MODELS)} (all; the last on GPUs)")
    add("--methods", help="commas between, or `all`, or `main` (all on mlp, main on the others)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="to compute in")
    add("--repeats", type=int, help="interleaved rounds (9; 3 with --quick)")
    add("--steps", type=int, default=5, help="steps in a turn, a multiple of 5 (5)")
    add("--quick", action="store_true", help="few methods and rounds")
    add("--json", type=Path, help="also write the results here")
    peers.add_arguments(parser)
    args = parser.parse_args()
    repeats = args.repeats or (3 if args.quick else 9)
    if repeats < 1 or args.steps < 1 or args.steps % methods.EVERY:
        parser.error("--repeats must be >= 1, and --steps a multiple of 5.")
    chosen = args.models.split(",") if args.models else models.default_models()
    for name in chosen:
        if name not in models.MODELS:
            parser.error(f"--models: {name!r} is none of {', '.join(models.MODELS)}.")
    wanted = _chosen_methods(args.methods, args.quick, parser)
    results = {}
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(peers.Worker(args.peers_python)) if args.peers else None
        for name in chosen:
            problem = models.MODELS[name](dtype=args.dtype)
            names = wanted or (list(methods.METHODS) if name == "mlp" else methods.MAIN)
            results[name] = measure(problem, names, repeats, args.steps, worker)
    settings = {"repeats": repeats, "steps": args.steps, "dtype": args.dtype}
    print("\n".join(lines({"models": results})))
    if args.json:
        record.write(args.json, {"settings": settings, "models": results})


def _chosen_methods(
    text: str | None, quick: bool, parser: argparse.ArgumentParser
) -> list[str] | None:
    """The names; None: what is usual for the model."""
    if text is None:
        return QUICK_METHODS if quick else None
    if text in ("all", "main"):
        return list(methods.METHODS) if text == "all" else methods.MAIN
    names = text.split(",")
    for name in names:
        if name not in methods.METHODS:
            parser.error(f"--methods: {name!r} is none of {', '.join(methods.METHODS)}.")
    return names


if __name__ == "__main__":
    main()
