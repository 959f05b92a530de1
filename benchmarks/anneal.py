"""SAM throughout, SAM in the anneal only, and SAM now and then, at equal gradients; with Muon too.

`python -m benchmarks.anneal` runs it. The learning rate is constant and falls to zero over the last
part of the run: that part is the anneal. A method with more gradients a step takes fewer steps, and
its schedule is shorter.

Fixed test images, on which nothing is chosen. Each arm spends ten runs on validation images, with
seeds of their own: the base optimisers on learning rates, six apart and four around the best; the
others six on rho at their base's rate, then four on rates around that. Then new seeds are trained.
"""

import argparse
import dataclasses
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
from flatopt import measures

ANNEAL = 0.3  # Share of the updates over which the learning rate falls to zero.
EVERY = 3  # As many sharp steps as in the anneal, but spread evenly.
BATCH = 64
CURVATURE_IMAGES = 1000
FIRST_TUNING_SEED = 1000
RATES = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "muon": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
AROUND = (0.5, 0.7, 1.4, 2.0)
RADII = {
    "sam": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "spectral": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of one data set; the test images are fixed, all others train and validate."""

    train_size: int
    validation_size: int
    test_size: int
    halve: bool  # Whether images are reduced to half their height and width.


SETTINGS = {
    "digits": Setting(300, 700, 797, halve=False),
    "fashion_mnist": Setting(5000, 5000, 10_000, halve=True),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A base optimiser and the stage before it.

    Attributes:
      base: "sgd", with momentum 0.9, or "muon".
      ascent: "sam", "spectral" or None, for the base alone.
      when: "throughout", "anneal" or "every".
    """

    base: str
    ascent: str | None = None
    when: str = "throughout"

    @property
    def name(self) -> str:
        """How the table calls it."""
        how = {"throughout": "", "anneal": ", in the anneal", "every": f", every {EVERY}"}
        return f"{self.ascent} + {self.base}{how[self.when]}" if self.ascent else self.base

    def steps(self, gradients: int) -> int:
        """A number of updates that take so many gradients, or one fewer."""
        share = {"throughout": 1.0, "anneal": ANNEAL, "every": 1 / EVERY}[self.when]
        steps = int(gradients / (1 + share)) if self.ascent else gradients
        while self._gradients(steps) > gradients:
            steps -= 1
        return steps

    def _gradients(self, steps: int) -> int:
        sharp = {
            "throughout": steps,
            "anneal": steps - decay_start(steps),
            "every": -(-steps // EVERY),
        }[self.when]
        return steps + (sharp if self.ascent else 0)

    def build(self, steps: int, rate: Any, rho: Any) -> optax.GradientTransformationExtraArgs:
        """The optimiser of a run of so many updates; rate and rho may be traced."""
        schedule = trapezoid(rate, steps)
        if self.base == "muon":
            base = optax.contrib.muon(schedule)
        else:
            base = optax.sgd(schedule, momentum=0.9)
        if self.ascent is None:
            return optax.with_extra_args_support(base)
        scale = flatopt.scale_to_norm if self.ascent == "sam" else flatopt.scale_to_spectral_norm
        start = decay_start(steps) if self.when == "anneal" else None
        every = EVERY if self.when == "every" else None
        return optax.chain(flatopt.gradient_at(scale(rho), start=start, every=every), base)


ARMS = [
    Arm("sgd"),
    *(Arm("sgd", "sam", when) for when in ("throughout", "anneal", "every")),
    Arm("muon"),
    *(Arm("muon", ascent, w) for ascent in ("sam", "spectral") for w in ("throughout", "anneal")),
]


def decay_start(steps: int) -> int:
    """Number of updates made when the learning rate begins to fall: where the recipe starts SAM."""
    return steps - round(ANNEAL * steps)


def trapezoid(rate: Any, steps: int) -> optax.Schedule:
    """Constant, then linear to zero."""
    length = steps - decay_start(steps)
    return lambda step: rate * jnp.clip((steps - step) / length, 0, 1)


def load(name: str, data_dir: Path | None) -> datasets.Dataset:
    """The pool first, then the test images, whichever the data set calls so."""
    setting, data = SETTINGS[name], datasets.load(name, data_dir)
    images = data.images
    if setting.halve:
        side = round(images.shape[1] ** 0.5) // 2
        images = images.reshape(-1, side, 2, side, 2).mean(axis=(2, 4)).reshape(len(images), -1)
        images = np.round(images).astype(np.uint8)
    pool = len(images) - setting.test_size if data.num_train is None else data.num_train
    order = np.arange(len(images))
    if data.num_train is None:  # There is no order to keep.
        order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.labels[order]
    shift, scale = data.shift, data.scale
    if setting.halve:
        shift, scale = float(images[:pool].mean()), float(images[:pool].std())
    return datasets.Dataset(images, labels, shift, scale, pool)


def make_task(data: datasets.Dataset, setting: Setting, seeds: list[int], tuning: bool) -> Any:
    """A model and the images of each seed: judged on validation images or on the test images."""
    pool = data.largest_train_size
    rows = [np.random.default_rng([seed, 7]).permutation(pool) for seed in seeds]
    train = np.stack([r[: setting.train_size] for r in rows]).astype(np.int32)
    if tuning:
        end = setting.train_size + setting.validation_size
        judged = np.stack([r[setting.train_size : end] for r in rows]).astype(np.int32)
    else:
        test = np.arange(pool, len(data.images), dtype=np.int32)
        judged = np.tile(test, (len(seeds), 1))
    split = datasets.Split(train, data.labels[train], judged)
    return training.Task(MLP(classes=data.classes), data, split, seeds)


class Scores(NamedTuple):
    """Of each seed."""

    accuracy: Any
    loss: Any
    train_loss: Any


def make_run(task: Any, arm: Arm, steps: int, seeds: list[int]) -> Callable[[Any, Any], Any]:
    """`(learning rate, rho) -> (parameters, scores)` of all seeds, compiled once for an arm."""
    batches = jax.tree.map(jnp.asarray, datasets.batches(task.split, seeds, steps, BATCH))

    def one_seed(params: Any, batches: datasets.Batches, own: Any, rate: Any, rho: Any) -> Any:
        tx = arm.build(steps, rate, rho)

        def update(carry: training.Carry, batch: datasets.Batches) -> tuple[Any, None]:
            x = task.inputs(task.images[batch.rows])
            return training.step(tx, flatopt.make_grad_fn(task.loss, x, batch.labels), carry), None

        start = training.Carry(params, tx.init(params))
        params = jax.lax.scan(update, start, batches)[0].params
        judged, labels = task.inputs(task.images[own.test_rows]), task.labels[own.test_rows]
        logits = task.logits(params, judged)
        x = task.inputs(task.images[own.train_rows])
        return params, Scores(
            accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            loss=task.loss(params, judged, labels),
            train_loss=task.loss(params, x, own.train_labels),
        )

    def run(rate: Any, rho: Any) -> Any:
        mapped = jax.vmap(one_seed, in_axes=(0, 1, 0, None, None))
        return mapped(task.initial_params, batches, task.split, rate, rho)

    return jax.jit(run)


def tune(
    run: Callable[[Any, Any], Any], arm: Arm, base_rate: float | None, bar: tqdm
) -> tuple[float, float, list[dict[str, float]]]:
    """Ten runs: the best learning rate and rho, and what each run was and gave."""
    tried: list[dict[str, float]] = []

    def attempt(rate: float, rho: float) -> None:
        scores = run(rate, rho)[1]
        # A run that diverged comes last.
        loss = float(jnp.nan_to_num(scores.loss, nan=np.inf).mean())
        accuracy = float(scores.accuracy.mean()) if np.isfinite(loss) else 0.0
        loss = loss if np.isfinite(loss) else 1e30
        tried.append({"rate": rate, "rho": rho, "accuracy": accuracy, "loss": loss})
        bar.update()

    def best() -> dict[str, float]:
        return max(tried, key=lambda one: (one["accuracy"], -one["loss"]))

    if arm.ascent is None:
        for rate in RATES[arm.base]:
            attempt(rate, 0.0)
    else:
        assert base_rate is not None, "bases are tuned before what stands on them"
        for rho in RADII[arm.ascent]:
            attempt(base_rate, rho)
    first = best()
    for factor in AROUND:
        attempt(factor * first["rate"], first["rho"])
    return best()["rate"], best()["rho"], tried


def top_eigenvalues(task: Any, params: Any) -> list[float]:
    """Of the training loss of each seed."""

    @jax.jit
    def one(params: Any, own: Any) -> jax.Array:
        x = task.inputs(task.images[own.train_rows[:CURVATURE_IMAGES]])
        labels = own.train_labels[:CURVATURE_IMAGES]
        return measures.top_eigenvalues(lambda p: task.loss(p, x, labels), params).values[0]

    return [
        float(one(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, task.split))))
        for i in range(len(task.keys))
    ]


def run_dataset(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms on one data set."""
    setting, data = SETTINGS[name], load(name, args.data_dir)
    tuning_seeds = [FIRST_TUNING_SEED + i for i in range(args.tuning_seeds)]
    seeds = list(range(args.seeds))
    tuning = make_task(data, setting, tuning_seeds, tuning=True)
    final = make_task(data, setting, seeds, tuning=False)
    rates: dict[str, float] = {}
    results = []
    number = len(RATES["sgd"]) + len(AROUND) + 1
    with tqdm(total=len(ARMS) * number, leave=False) as bar:
        for arm in ARMS:
            bar.set_description(f"{name}, {arm.name}")
            steps = arm.steps(args.gradients)
            run = make_run(tuning, arm, steps, tuning_seeds)
            rate, rho, tried = tune(run, arm, rates.get(arm.base), bar)
            rates.setdefault(arm.base, rate)
            params, scores = make_run(final, arm, steps, seeds)(rate, rho)
            bar.update()
            results.append(
                {
                    "dataset": name,
                    "arm": arm.name,
                    "base": arm.base,
                    "ascent": arm.ascent,
                    "when": arm.when,
                    "steps": steps,
                    "gradients": training.count_gradients(arm.build(steps, rate, rho), steps),
                    "learning_rate": rate,
                    "rho": rho,
                    "tuning": tried,
                    "accuracy": np.asarray(scores.accuracy, float).tolist(),
                    "train_loss": np.asarray(scores.train_loss, float).tolist(),
                    "top_eigenvalue": top_eigenvalues(final, params),
                }
            )
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """A Markdown table; differences are paired by seed."""
    table = [
        "| data | arm | updates | gradients | rate | rho | test accuracy, % | minus base, points "
        "| minus throughout, points | top eigenvalue |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    arms = {(a["dataset"], a["base"], a["ascent"], a["when"]): a for a in results["arms"]}
    for (dataset, base, ascent, when), arm in arms.items():
        alone = arms[dataset, base, None, "throughout"]
        whole = arms[dataset, base, ascent, "throughout"]
        cells = [dataset, arm["arm"], str(arm["steps"]), str(arm["gradients"])]
        cells += [f"{arm['learning_rate']:.2g}", f"{arm['rho']:g}" if ascent else ""]
        cells.append(_percent(arm["accuracy"]))
        cells.append(_percent(arm["accuracy"], alone["accuracy"]) if ascent else "")
        cells.append(_percent(arm["accuracy"], whole["accuracy"]) if when != "throughout" else "")
        cells.append(f"{np.mean(arm['top_eigenvalue']):.2g}")
        table.append(f"| {' | '.join(cells)} |")
    return table


def _percent(accuracy: Sequence[float], other: Sequence[float] | None = None) -> str:
    if other is None:
        return Estimate.of(100 * np.array(accuracy)).show(2)
    return Estimate.of(100 * np.subtract(accuracy, other)).show(2, "+")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    command = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anneal", description=__doc__)
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=os.environ.get("FLATOPT_DATA_DIR"),
        help="folder of .npz data sets, for all but digits ($FLATOPT_DATA_DIR)",
    )
    add("--datasets", default=",".join(SETTINGS), help="comma-separated (all)")
    add("--seeds", type=int, default=8, help="seeds of the results, trained together (8)")
    add("--tuning-seeds", type=int, default=4, help="other seeds, for the tuning (4)")
    add("--gradients", type=int, default=3000, help="gradients of each run (3000)")
    add("--json", type=Path, default=record.RESULTS / "anneal.json")
    args = parser.parse_args(command)
    arms = [arm for name in args.datasets.split(",") for arm in run_dataset(name, args)]
    results = {
        "seeds": list(range(args.seeds)),
        "tuning_seeds": [FIRST_TUNING_SEED + i for i in range(args.tuning_seeds)],
        "batch_size": BATCH,
        "anneal": ANNEAL,
        "arms": arms,
    }
    print("\n".join(lines(results)))
    record.write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
