"""AdamW, its averages, and three optimisers on real images, at an equal number of gradients.

`python -m benchmarks.averages` runs it. A product with the Hessian counts as two gradients. Of each
method the learning rate and its schedule are chosen on seeds of their own, from the same kind of
grid; then it is trained on the seeds of the table.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import optax
from tqdm import tqdm

import flatopt
from benchmarks import record
from benchmarks.compare import datasets, training
from benchmarks.compare.report import Estimate
from examples.models.mlp import MLP

BASELINE = "adamw"
DECAY, EMA_DECAY = 0.01, 0.99
RHO, HESSIAN_EVERY = 0.1, 10
# Chosen on the tuning seeds: where units are dead there is no curvature, and 1e-4 is a huge step.
EPSILON = 0.01
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SCHEDULES: dict[str, Callable[[float, int], optax.ScalarOrSchedule]] = {
    "constant": lambda rate, _: rate,
    "cosine": optax.cosine_decay_schedule,
}
Rate: TypeAlias = optax.ScalarOrSchedule


class Method(NamedTuple):
    """One optimiser.

    Attributes:
      build: makes it for a learning rate.
      rates: the learning rates to choose from.
      gradients: what ten updates cost.
      products: how many of these are two halves of a product with the Hessian.
      schedules: the schedules to choose from.
    """

    build: Callable[[Rate], optax.GradientTransformation]
    rates: Sequence[float] = ADAM_RATES
    gradients: int = 10
    products: int = 0
    schedules: Sequence[str] = tuple(SCHEDULES)


def _averaged(average: optax.GradientTransformation) -> Method:
    return Method(lambda rate: optax.chain(optax.adamw(rate, weight_decay=DECAY), average))


def _sassha(rate: Rate) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(DECAY)
    stage = flatopt.sassha(RHO, every=HESSIAN_EVERY, eps=EPSILON)
    return optax.chain(stage, decay, optax.scale_by_learning_rate(rate))


METHODS = {
    BASELINE: Method(lambda rate: optax.adamw(rate, weight_decay=DECAY)),
    "adamw, params_ema": _averaged(flatopt.params_ema(EMA_DECAY)),
    "adamw, bema": _averaged(flatopt.bema()),
    "pace": Method(lambda rate: flatopt.pace(rate, weight_decay=DECAY)),
    "schedule_free_plus": Method(
        lambda rate: flatopt.schedule_free_plus(learning_rate=rate),
        rates=(0.1, 0.3, 1.0, 3.0),
        schedules=("constant",),
    ),
    "sassha": Method(_sassha, rates=(1e-2, 3e-2, 1e-1, 3e-1), gradients=22, products=1),
}


def prepare(seeds: Sequence[int], args: argparse.Namespace) -> tuple[Any, Any]:
    """The task and the batches of these seeds."""
    dataset = datasets.load("digits", None)
    split = datasets.split(dataset, list(seeds), args.train_size)
    batches = datasets.batches(split, list(seeds), args.gradients, args.batch_size)
    return training.Task(MLP(classes=dataset.classes), dataset, split, list(seeds)), batches


def train(task: Any, batches: Any, method: Method, rate: float, schedule: str) -> dict[str, Any]:
    """Trains all seeds; returns what is measured of each."""
    steps = 10 * len(batches.rows) // method.gradients
    tx = method.build(SCHEDULES[schedule](rate, steps))
    counted = training.count_gradients(tx, 10)
    assert counted + method.products == method.gradients, (rate, schedule, counted)
    own = datasets.Batches(*(part[:steps] for part in batches))
    scores = task.score(training.train(task, tx, own).params)
    return {
        "learning_rate": rate,
        "schedule": schedule,
        "updates": steps,
        "test_accuracy": np.asarray(scores.accuracy).tolist(),
        "train_loss": np.asarray(scores.train_loss).tolist(),
        "top_eigenvalue": np.asarray(scores.top_eigenvalue).tolist(),
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Chooses the rates on some seeds, and trains on the others."""
    first = args.first_tuning_seed
    tuning = prepare(range(first, first + args.tuning_seeds), args)
    final = prepare(range(args.first_seed, args.first_seed + args.seeds), args)
    results = []
    for name, method in METHODS.items():
        grid = list(itertools.product(method.rates, method.schedules))
        tried = [train(*tuning, method, *setting) for setting in tqdm(grid, desc=name, leave=False)]
        accuracies = [np.mean(t["test_accuracy"]) for t in tried]
        best = tried[int(np.argmax(accuracies))]
        shown = [
            {"learning_rate": t["learning_rate"], "schedule": t["schedule"], "accuracy": float(a)}
            for t, a in zip(tried, accuracies, strict=True)
        ]
        arm = train(*final, method, best["learning_rate"], best["schedule"])
        results.append({"method": name, **arm, "tried_on_the_tuning_seeds": shown})
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """The table; differences from the baseline are paired by seed."""
    arms = {arm["method"]: arm for arm in results["results"]}
    head = ["method", "learning rate", "updates", "test accuracy, %", f"minus {BASELINE}, points"]
    head += ["train loss", "top eigenvalue"]
    rows = [f"| {' | '.join(head)} |", "| --- | --- |" + 5 * " ---: |"]
    for name, arm in arms.items():
        accuracy = 100 * np.array(arm["test_accuracy"])
        difference = accuracy - 100 * np.array(arms[BASELINE]["test_accuracy"])
        cells = [name, f"{arm['learning_rate']:g}, {arm['schedule']}", str(arm["updates"])]
        cells += [Estimate.of(accuracy).show(2)]
        cells += ["" if name == BASELINE else Estimate.of(difference).show(2, "+")]
        cells += [f"{np.mean(arm[field]):.2g}" for field in ("train_loss", "top_eigenvalue")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averages", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=8, help="number of seeds, trained together (8)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add("--tuning-seeds", type=int, default=4, help="seeds to choose learning rates on (4)")
    add("--first-tuning-seed", type=int, default=20, help="the first of them (20)")
    add("--gradients", type=int, default=3000, help="of each run (3000)")
    add("--train-size", type=int, default=300, help="training images (300)")
    add("--batch-size", type=int, default=32, help="images in a gradient (32)")
    add("--json", type=Path, default=Path("benchmarks/results/averages.json"))
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    written = {
        "seeds": list(range(args.first_seed, args.first_seed + args.seeds)),
        "settings": {name: v for name, v in vars(args).items() if isinstance(v, int)},
        "results": run(args),
    }
    print("\n".join(lines(written)))
    record.write(args.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
