"""What BatchNorm statistics an average of weights needs: one run, evaluated in five ways.

A network with BatchNorm trains with a constant learning rate while `swa` averages its weights. Its
running statistics follow the weights in training, not their average.

The setting keeps the weights moving, as averaging needs: a high rate, small batches, and a fifth of
the training labels wrong, so that no network fits them all. It was chosen on seeds 100 to 107; the
seeds of a run are others. Where the weights have settled, all five ways score the same.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from benchmarks.compare import datasets, report, training
from benchmarks.compare.datasets import Array, Batches, Dataset, Split
from benchmarks.compare.methods import AVERAGE_FROM, MOMENTUM, Setting
from examples.models.batch_norm_mlp import BatchNormMLP
from flatopt.linen import recompute_batch_stats

NAME = "swa_bn"
ABOUT = (
    f"a second table: a network with BatchNorm, averaged over the last {1 - AVERAGE_FROM:.0%}, "
    "with stale and with recomputed statistics"
)

LEARNING_RATE = 0.2
BATCH_SIZE = 16
LABEL_NOISE = 0.2
MOST_STEPS = 1000


class Evaluations(NamedTuple):
    """Test accuracy of each seed, [seeds], by whose weights and which statistics.

    Attributes:
      last: the last weights with their running statistics.
      last_recomputed: the last weights with statistics recomputed over the training images.
      stale: the average with the running statistics of the last weights.
      averaged: the average with the average of the running statistics.
      recomputed: the average with statistics recomputed for it.
    """

    last: Array
    last_recomputed: Array
    stale: Array
    averaged: Array
    recomputed: Array


class Study(NamedTuple):
    """The evaluations, and what they cost.

    Attributes:
      accuracy: the evaluations.
      seconds: time of training and evaluation, all seeds together, with compilation.
    """

    accuracy: Evaluations
    seconds: float


class _Carry(NamedTuple):
    params: Any
    stats: Any
    opt_state: optax.OptState
    stats_average: optax.OptState


def study(
    dataset: Dataset,
    seeds: list[int],
    steps: int,
    train_size: int,
    on_progress: Callable[[int], object] | None = None,
) -> Study:
    """Trains one network a seed, all in one compiled scan, and evaluates it in five ways."""
    began = time.perf_counter()
    split = datasets.split(dataset, seeds, train_size, LABEL_NOISE)
    batches = datasets.batches(split, seeds, steps, min(BATCH_SIZE, train_size))
    task = training.Task(BatchNormMLP(classes=dataset.classes), dataset, split, seeds)
    setting = Setting(steps, max(1, train_size // BATCH_SIZE), LEARNING_RATE)
    average = flatopt.swa(start=setting.average_start, every=setting.steps_per_epoch)
    tx = optax.chain(optax.sgd(LEARNING_RATE, momentum=MOMENTUM), average)
    batch_size = batches.rows.shape[-1]

    def loss_fn(params: Any, stats: Any, x: jax.Array, labels: Array) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits, new = task.model.apply(variables, x, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new["batch_stats"]

    def step(carry: _Carry, x: jax.Array, labels: Array) -> _Carry:
        grads, stats = jax.grad(loss_fn, has_aux=True)(carry.params, carry.stats, x, labels)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        # The same stage averages any tree: here the statistics, which no update moves.
        still = optax.tree.zeros_like(stats)
        _, stats_average = average.update(still, carry.stats_average, stats)
        return _Carry(params, stats, opt_state, stats_average)

    def evaluate(carry: _Carry, images: jax.Array, labels: jax.Array, own: Split) -> Evaluations:
        test_inputs, test_labels = task.inputs(images[own.test_rows]), labels[own.test_rows]
        train_inputs = task.inputs(images[own.train_rows])
        ends = list(range(batch_size, len(train_inputs), batch_size))
        in_batches = jnp.split(train_inputs, ends)

        def accuracy(params: Any, stats: Any) -> jax.Array:
            logits = task.logits({"params": params, "batch_stats": stats}, test_inputs)
            return jnp.mean(jnp.argmax(logits, axis=-1) == test_labels)

        def recomputed(params: Any) -> Any:
            variables = {"params": params, "batch_stats": carry.stats}
            return recompute_batch_stats(task.model, variables, in_batches, train=True)

        mean = flatopt.eval_params(carry.opt_state, carry.params)
        mean_stats = flatopt.eval_params(carry.stats_average, carry.stats)
        return Evaluations(
            last=accuracy(carry.params, carry.stats),
            last_recomputed=accuracy(carry.params, recomputed(carry.params)),
            stale=accuracy(mean, carry.stats),
            averaged=accuracy(mean, mean_stats),
            recomputed=accuracy(mean, recomputed(mean)),
        )

    @jax.jit
    def run(
        variables: Any, images: jax.Array, labels: jax.Array, split: Split, batches: Batches
    ) -> Evaluations:
        params, stats = variables["params"], variables["batch_stats"]
        start = _Carry(params, stats, jax.vmap(tx.init)(params), jax.vmap(average.init)(stats))

        def step_of_all(carry: _Carry, batch: Batches) -> tuple[_Carry, None]:
            return jax.vmap(step)(carry, task.inputs(images[batch.rows]), batch.labels), None

        carry, _ = jax.lax.scan(step_of_all, start, batches)
        return jax.vmap(evaluate, in_axes=(0, None, None, 0))(carry, images, labels, split)

    batches = jax.tree.map(jnp.asarray, batches)
    result = run(task.initial_params, task.images, task.labels, task.split, batches)
    accuracy = jax.tree.map(np.asarray, jax.block_until_ready(result))
    if on_progress is not None:
        on_progress(steps)
    return Study(accuracy, time.perf_counter() - began)


_ROWS = {
    "last": ("last", "running"),
    "last_recomputed": ("last", "recomputed"),
    "stale": ("average", "running (stale)"),
    "averaged": ("average", "averaged"),
    "recomputed": ("average", "recomputed"),
}


def table(result: Study) -> str:
    """One line an evaluation: its accuracy, and its paired differences from the two to beat."""
    accuracy = result.accuracy._asdict()
    header = ["weights", "statistics", "test accuracy %", "minus last (points)", "minus stale"]
    rows = [
        [
            *_ROWS[name],
            report.Estimate.of(100 * own).show(2),
            *(
                "" if own is other else _points(own, other).show(2, "+")
                for other in (accuracy["last"], accuracy["stale"])
            ),
        ]
        for name, own in accuracy.items()
    ]
    lines = report.align(header, rows)
    title = (
        f"{NAME}: one run with BatchNorm, a constant learning rate and {LABEL_NOISE:.0%} wrong "
        f"labels, evaluated in five ways ({result.seconds:.1f} s with compilation)"
    )
    return f"{title}\n{lines}"


def to_json(result: Study) -> dict[str, Any]:
    """The results as plain numbers: accuracies are shares, differences points."""
    accuracy = result.accuracy
    differences = {
        "recomputed_minus_stale": _points(accuracy.recomputed, accuracy.stale),
        "recomputed_minus_last": _points(accuracy.recomputed, accuracy.last),
    }
    return {
        "test_accuracy": {name: own.tolist() for name, own in accuracy._asdict().items()},
        "difference_points": {
            name: {"mean": estimate.mean, "standard_error": estimate.error}
            for name, estimate in differences.items()
        },
        "seconds": result.seconds,
    }


def _points(accuracy: Array, other: Array) -> report.Estimate:
    """The difference in percentage points, paired by seed."""
    return report.Estimate.of(100 * (np.asarray(accuracy) - np.asarray(other)))
