"""Fast geometric ensembling on digits: one model, the mean of snapshots, the ensemble of them.

Run it with `python -m examples.fge`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from benchmarks.compare import datasets, report, training
from benchmarks.compare.methods import MOMENTUM
from examples.models.mlp import MLP

TRAIN_SIZE, BATCH_SIZE, LABEL_NOISE = 300, 32, 0.2
EPOCH = TRAIN_SIZE // BATCH_SIZE
MAX_RATE, MIN_RATE = 0.1, 0.005
CYCLE = 4 * EPOCH


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.fge", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (8)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs before the cycles (40)")
    parser.add_argument("--cycles", type=int, default=6, help="cycles, one model each (6)")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.cycles) < 1:
        parser.error("--seeds, --epochs and --cycles must be at least 1")
    accuracy = run(args.seeds, args.epochs, args.cycles)
    last = accuracy["last model"]
    rows = [
        [
            name,
            report.Estimate.of(100 * own).show(2),
            "" if own is last else report.Estimate.of(100 * (own - last)).show(2, "+"),
        ]
        for name, own in accuracy.items()
    ]
    print(report.align(["evaluated", "test accuracy %", "minus last (points)"], rows))
    print(f"Digits, {LABEL_NOISE:.0%} wrong training labels, {args.seeds} seeds ± standard error.")
    return 0


def run(seeds: int, epochs: int, cycles: int) -> dict[str, np.ndarray]:
    """Test accuracy of each seed: the last model, the models' mean, their ensemble."""
    dataset = datasets.load("digits", None)
    numbers = list(range(seeds))
    split = datasets.split(dataset, numbers, TRAIN_SIZE, LABEL_NOISE)
    first = epochs * EPOCH
    steps = first + cycles * CYCLE - CYCLE // 2  # Half a cycle to the first model.
    batches = datasets.batches(split, numbers, steps, BATCH_SIZE)
    task = training.Task(MLP(classes=dataset.classes), dataset, split, numbers)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(task.logits(params, x))

    def one_seed(params: Any, own: Any, test_rows: jax.Array) -> dict[str, jax.Array]:
        rows, labels = own
        x = task.inputs(task.images[rows])
        tx = optax.sgd(MAX_RATE, momentum=MOMENTUM)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(task.loss)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (x[:first], labels[:first])
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), start)
        models = flatopt.fast_geometric_ensemble(
            task.loss,
            params,
            (x[first:], labels[first:]),
            period=CYCLE,
            max_learning_rate=MAX_RATE,
            min_learning_rate=MIN_RATE,
        )
        test = task.inputs(task.images[test_rows])

        def accuracy(probabilities: jax.Array) -> jax.Array:
            return jnp.mean(jnp.argmax(probabilities, axis=-1) == task.labels[test_rows])

        last = jax.tree.map(lambda leaf: leaf[-1], models)
        return {
            "last model": accuracy(predict(last, test)),
            "mean of models": accuracy(predict(flatopt.merge_params(models), test)),
            "ensemble": accuracy(flatopt.ensemble_predict(predict, models, test)),
        }

    own = (jnp.asarray(batches.rows), jnp.asarray(batches.labels))
    many = jax.jit(jax.vmap(one_seed, in_axes=(0, 1, 0)))
    result = many(task.initial_params, own, jnp.asarray(split.test_rows))
    order = ("last model", "mean of models", "ensemble")
    return {name: np.asarray(result[name]) for name in order}


if __name__ == "__main__":
    sys.exit(main())
