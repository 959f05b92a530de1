"""A whole training run of the digits MLP, one compiled scan for all seeds, beside a PyTorch loop.

    python -m benchmarks.whole_run --peers --json benchmarks/results/whole_run.json

Timed is everything but compilation, which is stated apart: handing over the data, making weights
and state, all steps, and bringing the weights to evaluate back. The PyTorch loop starts with its
tensors made, and trains on the same images in the same order from the weights of the first seed,
with one thread or all, whichever is faster.
"""

import argparse
import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from tqdm import tqdm

import flatopt
from benchmarks import by_hand, methods, models, peers, record, timing
from benchmarks.models import Problem
from benchmarks.step_time import show

WIDTHS = (64, 64, 64, models.CLASSES)
BATCH_SIZE = 64
STEPS, QUICK_STEPS = 1000, 300
SEEDS = (1, 8)
METHODS = ["sgd", "sam", "asam", "gsam", "wsam", "looksam every=5", "msam", "swa", "params_ema",
           "lookahead"]  # fmt: skip
QUICK_METHODS = ["sgd", "sam", "msam", "swa"]


def digits() -> Problem:
    """The network and all images; its batch is the whole data set."""
    data = sklearn.datasets.load_digits()
    x = jnp.asarray(data.data / 16, jnp.float32)
    y = jnp.asarray(data.target, jnp.int32)
    return models.mlp(WIDTHS, BATCH_SIZE)._replace(batch=(x, y))


def batches(steps: int, images: int, seeds: int) -> np.ndarray:
    """Rows of each step of each seed: [seeds, steps, batch]. The first seed's are always equal."""
    return np.stack(
        [
            np.random.default_rng(s).integers(0, images, size=(steps, BATCH_SIZE), dtype=np.int32)
            for s in range(seeds)
        ]
    )


def training(name: str, problem: Problem) -> Callable[..., Any]:
    """The run: from the weights of the first seed, images, labels and rows to trained weights."""
    tx = methods.METHODS[name]()
    step = by_hand.with_flatopt(tx, problem.loss_fn)

    def one_seed(first: Any, x: jax.Array, y: jax.Array, seed: jax.Array, rows: Any) -> Any:
        params = jax.tree.map(lambda p, q: jnp.where(seed == 0, p, q), first, _init(seed))

        def body(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            return step(carry, (x[rows], y[rows])), None

        (params, opt_state), _ = jax.lax.scan(body, by_hand.init_of(tx)(params), rows)
        return params, flatopt.eval_params(opt_state, params)

    return jax.vmap(one_seed, in_axes=(None, None, None, 0, 0))


def _init(seed: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, (m, n) in zip(keys, itertools.pairwise(WIDTHS), strict=True)
    ]


def measure(
    names: list[str],
    steps: int,
    repeats: int,
    seeds: tuple[int, ...] = SEEDS,
    worker: peers.Worker | None = None,
) -> dict[str, Any]:
    """What the results file says."""
    problem = digits()
    result: dict[str, Any] = {"widths": WIDTHS, "batch_size": BATCH_SIZE, "steps": steps}
    result |= {"num_params": models.num_params(problem), "peer_errors": {}, "rows": []}
    host = jax.tree.map(np.asarray, (problem.params, *problem.batch))
    rows = {n: batches(steps, len(host[1]), n) for n in seeds}
    if worker is not None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                answer = worker.load(problem, Path(folder), rows=rows[seeds[0]][0])
            result["peer_versions"] = answer["versions"]
        except peers.PeerError as error:
            result["peer_errors"]["all"] = str(error)
            worker = None
    for name in tqdm(names, disable=None):
        peer = next((p for p, ours in peers.PEERS.items() if ours == name), None)
        row = _measure_method(name, problem, host, rows, repeats, worker, peer, result)
        result["rows"].append(row)
    return result


def _measure_method(
    name: str,
    problem: Problem,
    host: Any,
    rows: dict[int, np.ndarray],
    repeats: int,
    worker: peers.Worker | None,
    peer: str | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """One method: runs of all numbers of seeds and of PyTorch take turns."""
    row: dict[str, Any] = {"method": name, "compile_seconds": {}, "loss": {}}
    row["gradients_per_step"] = methods.gradients_per_step(name)
    turns: dict[str, timing.Turn] = {}
    for number, own in rows.items():
        arguments = (*host, np.arange(number, dtype=np.int32), own)
        began = time.perf_counter()
        run = jax.jit(training(name, problem)).lower(*arguments).compile()
        row["compile_seconds"][str(number)] = time.perf_counter() - began
        turns[str(number)] = functools.partial(_timed_run, run, arguments)
        params, _ = run(*arguments)
        first = jax.tree.map(lambda leaf: leaf[0], params)
        row["loss"][str(number)] = float(problem.loss_fn(first, *problem.batch))
    if worker is not None and peer is not None:
        try:
            answer = worker.ask("run", variant=peer, settings=peers.SETTINGS)
            row["peer"], row["loss"]["peer"] = peer, answer["loss"]
            row["peer_threads"] = answer["threads"]
            turns["peer"] = lambda _: worker.ask("run", variant=peer, settings=peers.SETTINGS)[
                "seconds"
            ]
        except peers.PeerError as error:
            result["peer_errors"][peer] = str(error)
    seconds = timing.interleaved_seconds(turns, repeats, 1)
    per_seed = {k: [s / (int(k) if k != "peer" else 1) for s in v] for k, v in seconds.items()}
    row["seconds_per_seed"] = {k: timing.summary(v) for k, v in per_seed.items()}
    if "peer" in seconds:
        row["times_faster_than_peer"] = {
            k: timing.ratio(per_seed["peer"], per_seed[k]) for k in per_seed if k != "peer"
        }
    return row


def _timed_run(run: Any, arguments: Any, _: int) -> float:
    """From arrays of the host to arrays of the host."""
    began = time.perf_counter()
    jax.device_get(run(*arguments))
    return time.perf_counter() - began


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    seeds = list(results["rows"][0]["compile_seconds"])
    columns = [f"{n} seed{'s' if n != '1' else ''}, s a seed" for n in seeds]
    faster = [f"times faster, {n} seed{'s' if n != '1' else ''}" for n in seeds]
    heads = ["method", "gradients", *columns, "compile, s", "PyTorch, s", *faster]
    text = [f"| {' | '.join(heads)} |", f"| --- | {' | '.join(['---:'] * (len(heads) - 1))} |"]
    for row in results["rows"]:
        own, beside = row["seconds_per_seed"], row.get("times_faster_than_peer", {})
        cells = [
            row["method"],
            f"{row['gradients_per_step']:g}",
            *(f"{own[n]['median']:.3f}" for n in seeds),
            " and ".join(f"{row['compile_seconds'][n]:.2f}" for n in seeds),
            f"{own['peer']['median']:.3f}" if "peer" in own else "",
            *(show(beside[n], 1) if n in beside else "" for n in seeds),
        ]
        text.append(f"| {' | '.join(cells)} |")
    for name, error in results["peer_errors"].items():
        text += ["", f"Did not run: {name}: {error}"]
    return text


def main() -> None:
    """Measures, prints a table and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", help="commas between")
    add("--repeats", type=int, help="rounds (7; 2 with --quick)")
    add("--steps", type=int, help=f"training steps ({STEPS}; {QUICK_STEPS} with --quick)")
    add("--quick", action="store_true", help="few methods, steps and rounds")
    add("--json", type=Path, help="also write the results here")
    peers.add_arguments(parser)
    args = parser.parse_args()
    names = QUICK_METHODS if args.quick else METHODS
    names = args.methods.split(",") if args.methods else names
    for name in names:
        if name not in methods.METHODS:
            parser.error(f"--methods: {name!r} is none of {', '.join(methods.METHODS)}.")
    repeats = args.repeats or (2 if args.quick else 7)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    if repeats < 1 or steps < 1:
        parser.error("--repeats and --steps must be at least 1.")
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(peers.Worker(args.peers_python)) if args.peers else None
        results = measure(names, steps, repeats, worker=worker)
    print("\n".join(lines(results)))
    if args.json:
        record.write(args.json, {"settings": {"repeats": repeats}, **results})


if __name__ == "__main__":
    main()
