"""SGD, Entropy-SGD and replicated SGD on real images, at equal cost and at equal training loss.

`python -m benchmarks.local_entropy` runs it. Every method takes the same
number of gradients, each on a minibatch. At equal cost their last weights are compared. At equal
training loss each seed's target is the highest of the methods' last losses, and of each run the
recorded weights are taken whose loss is nearest to it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flatopt
from benchmarks import record
from benchmarks.compare import datasets, training
from benchmarks.compare.report import Estimate
from examples.models.mlp import MLP

SIGMA = 0.3  # Of the multiplicative noise.
DRAWS = 20
RECORDS = 60  # Weights recorded along a run.
SETTINGS = {
    "digits": {"train_size": 300, "learning_rate": 0.1},
    "fashion_mnist": {"train_size": 5000, "learning_rate": 0.02},
}
# Chosen on seeds 20 to 23 (rates and the loop on digits, the coupling on Fashion-MNIST).
MOMENTUM = 0.9
ENTROPY_STEPS, GAMMA = 5, (1e-3, 1e-1)
INNER_RATE = 6.0  # In units of SGD's rate: the loop has no momentum, which multiplies SGD's by 10.
REPLICAS, STRENGTH, STD = 3, (1e-2, 1.0), 0.02


class Method(NamedTuple):
    """One optimiser, made for a number of updates and a learning rate."""

    build: Callable[[int, float], optax.GradientTransformation]
    evaluations: int  # Gradients in an update.


def _sgd(steps: int, rate: float) -> optax.GradientTransformation:
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=MOMENTUM)


def _entropy_sgd(steps: int, rate: float) -> optax.GradientTransformation:
    inner = flatopt.local_entropy(
        ENTROPY_STEPS,
        flatopt.strength_schedule("exponential", *GAMMA, steps),
        inner_learning_rate=optax.cosine_decay_schedule(INNER_RATE * rate, steps),
    )
    return optax.chain(inner, optax.sgd(1.0))  # To the mean of the loop.


def _replicated_sgd(steps: int, rate: float) -> optax.GradientTransformation:
    strength = flatopt.strength_schedule("exponential", *STRENGTH, steps)
    return flatopt.replicated_sgd(_sgd(steps, rate), REPLICAS, strength, std=STD)


METHODS = {
    "sgd": Method(_sgd, 1),
    "entropy_sgd": Method(_entropy_sgd, ENTROPY_STEPS),
    "replicated_sgd": Method(_replicated_sgd, REPLICAS),
}


def run_recorded(
    task: training.Task,
    tx: optax.GradientTransformation,
    batches: datasets.Batches,
    bar: tqdm,
) -> Any:
    """Trains all seeds; returns the weights to evaluate along the run, [records, seeds, ...]."""
    recorded: list[Any] = []

    def keep(params: Any) -> None:
        bar.update()
        recorded.append(jax.tree.map(np.asarray, params))

    training.train(task, tx, batches, fresh_batches=True, pieces=RECORDS, on_piece=keep)
    return jax.tree.map(lambda *xs: np.stack(xs), *recorded)


class Scores(NamedTuple):
    """What is measured of a network, one value a seed."""

    accuracy: Any
    train_loss: Any
    train_error: Any
    local_energy: Any


def _errors(task: training.Task, params: Any, x: jax.Array, labels: Any) -> jax.Array:
    return jnp.mean(jnp.argmax(task.logits(params, x), axis=-1) != labels)


def _local_energy(
    task: training.Task, params: Any, x: jax.Array, labels: Any, key: jax.Array
) -> jax.Array:
    """Mean rise of the training error when each weight is multiplied by `1 + SIGMA * normal`."""

    def one(key: jax.Array) -> jax.Array:
        noise = optax.tree.random_like(key, params, jax.random.normal)
        kicked = jax.tree.map(lambda w, z: w * (1 + SIGMA * z), params, noise)
        return _errors(task, kicked, x, labels)

    noisy = jax.lax.map(one, jax.random.split(key, DRAWS))
    return jnp.mean(noisy) - _errors(task, params, x, labels)


def make_measures(task: training.Task) -> tuple[Callable[[Any], Any], Callable[[Any], Scores]]:
    """The training loss of each seed, and all scores of each seed."""

    @jax.jit
    def losses(params: Any) -> Any:
        def one(arguments: Any) -> jax.Array:
            params, own = arguments
            x = task.inputs(task.images[own.train_rows])
            return task.loss(params, x, own.train_labels)

        return jax.lax.map(one, (params, task.split))

    @jax.jit
    def scores(params: Any) -> Scores:
        def one(arguments: Any) -> Scores:
            params, own, key = arguments
            x = task.inputs(task.images[own.train_rows])
            tested = task.inputs(task.images[own.test_rows])
            return Scores(
                accuracy=1 - _errors(task, params, tested, task.labels[own.test_rows]),
                train_loss=task.loss(params, x, own.train_labels),
                train_error=_errors(task, params, x, own.train_labels),
                # The same noise for every method, up to the weights that it multiplies.
                local_energy=_local_energy(
                    task, params, x, own.train_labels, jax.random.fold_in(key, 5)
                ),
            )

        return jax.lax.map(one, (params, task.split, task.keys))

    return losses, scores


def run(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods on one data set."""
    setting = SETTINGS[name]
    dataset = datasets.load(name, args.data_dir)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    split = datasets.split(dataset, seeds, int(setting["train_size"]))
    batches = datasets.batches(split, seeds, args.evaluations, args.batch_size)
    task = training.Task(MLP(classes=dataset.classes), dataset, split, seeds)
    losses, scores = make_measures(task)
    runs, curves = {}, {}
    with tqdm(total=len(METHODS) * RECORDS, leave=False) as bar:
        for method, (build, evaluations) in METHODS.items():
            bar.set_description(f"{name}, {method}")
            steps = args.evaluations // evaluations
            first = datasets.Batches(*(part[:steps] for part in batches))
            tx = build(steps, setting["learning_rate"])
            counted = training.count_gradients(tx, min(steps, 100))
            assert counted == evaluations * min(steps, 100), (method, counted)
            runs[method] = run_recorded(task, tx, first, bar)
            length = len(jax.tree.leaves(runs[method])[0])
            curves[method] = np.stack(
                [losses(jax.tree.map(lambda x, i=i: x[i], runs[method])) for i in range(length)]
            )
    target = np.max([curve[-1] for curve in curves.values()], axis=0)
    results = []
    for method, recorded in runs.items():
        steps = args.evaluations // METHODS[method].evaluations
        nearest = np.argmin(np.abs(np.log(curves[method]) - np.log(target)), axis=0)
        for kind, where in (
            ("equal gradients", np.full(len(seeds), len(curves[method]) - 1)),
            ("equal training loss", nearest),
        ):
            params = jax.tree.map(lambda x, at=where: x[at, np.arange(len(at))], recorded)
            results.append(
                {
                    "dataset": name,
                    "method": method,
                    "compared_at": kind,
                    "steps": steps,
                    "gradient_evaluations_per_seed": steps * METHODS[method].evaluations,
                    "record": where.tolist(),
                    **{k: np.asarray(v).tolist() for k, v in scores(params)._asdict().items()},
                }
            )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown; differences from SGD are paired by seed."""
    lines = [
        "| data | compared at | method | test accuracy % | minus sgd | local energy % "
        "| minus sgd | train loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(results, key=lambda r: (r["dataset"], r["compared_at"]))
    for result in order:
        (sgd,) = (
            r
            for r in results
            if r["method"] == "sgd"
            and (r["dataset"], r["compared_at"]) == (result["dataset"], result["compared_at"])
        )
        cells = [result["dataset"], result["compared_at"], result["method"]]
        for field in ("accuracy", "local_energy"):
            difference = np.subtract(result[field], sgd[field])
            cells.append(Estimate.of(100 * np.array(result[field])).show(2))
            cells.append("" if result is sgd else Estimate.of(100 * difference).show(2, "+"))
        cells.append(f"{np.mean(result['train_loss']):.2g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    command = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local_entropy", description=__doc__)
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=os.environ.get("FLATOPT_DATA_DIR"),
        help="folder of .npz data sets, for all but digits ($FLATOPT_DATA_DIR)",
    )
    add("--datasets", default=",".join(SETTINGS), help="comma-separated (all)")
    add("--seeds", type=int, default=8, help="number of seeds, trained together (8)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add("--evaluations", type=int, default=6000, help="gradients of each run (6000)")
    add("--batch-size", type=int, default=32, help="images in a gradient (32)")
    add("--json", type=Path, default=Path("benchmarks/results/local_entropy.json"))
    args = parser.parse_args(command)
    results = [result for name in args.datasets.split(",") for result in run(name, args)]
    print(table(results))
    written = {
        "seeds": list(range(args.first_seed, args.first_seed + args.seeds)),
        "sigma": SIGMA,
        "draws": DRAWS,
        "results": results,
    }
    record.write(args.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
