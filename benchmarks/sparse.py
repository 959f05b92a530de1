"""Static masks, SET and RigL beside dense networks of as many weights, on real images.

`python -m benchmarks.sparse` runs it: an MLP at several sparsities, all seeds in one compiled
program, test accuracy and flatness at the last weights; and what a step costs between two changes
of the mask. The flatness of a sparse network is that among its living weights.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flatopt
from benchmarks import models, record, timing
from benchmarks.compare import datasets
from benchmarks.compare.report import Estimate

HIDDEN = (128, 128)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
GROW = {"static mask": None, "SET": "random", "RigL": "gradient"}
DENSE, FULL = "dense, as many weights", "dense, all weights"
MOMENTUM = 0.9
# Fraction and period are the defaults of the authors' program.
FRACTION, EVERY, STOP = 0.3, 100, 0.75
RHO = 0.05  # Of SAM's sharpness.
TIMED: dict[str, Callable[[], models.Problem]] = {
    "mlp": models.mlp,
    "cnn": models.cnn,
    "transformer": models.transformer,
}
NEVER = 2**30  # Updates between two changes, where a step without one is timed.


def init(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """He's initialisation, for the dense network, sparse or not."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) * math.sqrt(2 / m), "bias": jnp.zeros(n)}
        for k, (m, n) in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def logits(params: Any, x: jax.Array) -> jax.Array:
    """An MLP with ReLU."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)
    return jnp.mean(losses)


def number_of_weights(widths: Sequence[int]) -> int:
    """Entries of all kernels."""
    return sum(m * n for m, n in itertools.pairwise(widths))


def narrow(widths: Sequence[int], sparsity: float) -> tuple[int, ...]:
    """The widths whose dense network has as many weights as the sparse one, or the nearest."""
    target = (1 - sparsity) * number_of_weights(widths)

    def of(hidden: int) -> tuple[int, ...]:
        return (widths[0], *[hidden] * (len(widths) - 2), widths[-1])

    return min(map(of, range(1, widths[1] + 1)), key=lambda w: abs(number_of_weights(w) - target))


def optimiser(
    method: str, sparsity: float, steps: int, rate: float, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """SGD with a cosine schedule, in a mask or not."""
    sgd = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=MOMENTUM)
    if method not in GROW:
        return optax.with_extra_args_support(sgd)
    last = int(STOP * steps)
    fraction = optax.cosine_decay_schedule(FRACTION, last)
    return flatopt.sparse_training(
        sgd, sparsity, grow=GROW[method], every=EVERY, stop=last, fraction=fraction, key=key
    )


def trainer(
    method: str, sparsity: float, widths: Sequence[int], args: argparse.Namespace
) -> Callable[..., dict[str, jax.Array]]:
    """The whole run of one seed: from its key and images to what is measured."""

    def run(key: jax.Array, train: Any, batches: Any, test: Any) -> dict[str, jax.Array]:
        start, masks = jax.random.split(key)
        tx = optimiser(method, sparsity, args.steps, args.learning_rate, masks)
        params = init(start, widths)
        opt_state = tx.init(params)
        params = flatopt.eval_params(opt_state, params)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, opt_state = carry
            grads = jax.grad(loss)(params, train[0][rows], train[1][rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), batches)

        def living(params: Any, batch: Any) -> jax.Array:
            return loss(flatopt.eval_params(opt_state, params), *batch)

        one_batch = jax.tree.map(lambda x: x[None], train)
        (top,) = flatopt.measures.top_eigenvalues(living, params, one_batch).values
        sharpness = flatopt.measures.sam_sharpness(living, params, one_batch, rho=RHO)
        return {
            "accuracy": jnp.mean(jnp.argmax(logits(params, test[0]), -1) == test[1]),
            "train_loss": loss(params, *train),
            "top_eigenvalue": top,
            "sam_sharpness": sharpness,
            "weights": sum(jnp.count_nonzero(layer["kernel"]) for layer in params),
        }

    return run


def arms(dataset: datasets.Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every sparsity: one value a seed of each quantity."""
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    split = datasets.split(dataset, seeds, args.train_size)
    x = (dataset.images - dataset.shift) / dataset.scale
    x = x.astype(np.float32)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    train = jnp.array(x[split.train_rows]), jnp.array(split.train_labels)
    test = jnp.array(x[split.test_rows]), jnp.array(dataset.labels[split.test_rows])
    batches = jnp.stack([_order(seed, args) for seed in seeds])
    whole = (x.shape[1], *HIDDEN, dataset.classes)
    plan: list[tuple[str, float, tuple[int, ...]]] = [(FULL, 0.0, whole)]
    for sparsity in args.sparsities:
        plan += [(method, sparsity, whole) for method in GROW]
        plan += [(DENSE, sparsity, narrow(whole, sparsity))]
    found = []
    for method, sparsity, widths in tqdm(plan, leave=False):
        run = jax.jit(jax.vmap(trainer(method, sparsity, widths, args)))
        values = run(keys, train, batches, test)
        arm = {"method": method, "sparsity": sparsity, "widths": list(widths)}
        found.append(arm | {name: np.asarray(x).tolist() for name, x in values.items()})
    return found


def _order(seed: int, args: argparse.Namespace) -> jax.Array:
    """Rows of each batch: one random order of the images after another."""
    rng = np.random.default_rng([seed, 1])
    epochs = -(-args.steps * args.batch_size // args.train_size)
    order = np.concatenate([rng.permutation(args.train_size) for _ in range(epochs)])
    return jnp.array(order[: args.steps * args.batch_size].reshape(args.steps, -1))


def step_times(problem: models.Problem, rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step between two changes of the mask, and how many of SGD's or Adam's."""
    result = {}
    for name, base in {"sgd": optax.sgd(1e-3, momentum=MOMENTUM), "adam": optax.adam(1e-4)}.items():
        orders = ("instead", "before", "after")
        variants = {"base": base, "static mask": flatopt.sparse_training(base, 0.9, grow=None)}
        variants |= {
            f'order="{order}"': flatopt.sparse_training(base, 0.9, order=order, every=NEVER)
            for order in orders
        }
        turns = {label: _turn(problem, tx) for label, tx in variants.items()}
        seconds = timing.interleaved_seconds(turns, rounds, steps)
        result[name] = {
            label: {
                "milliseconds": timing.summary([1e3 * s for s in own]),
                "over_base": timing.ratio(own, seconds["base"]),
            }
            for label, own in seconds.items()
        }
    return result


def _turn(problem: models.Problem, tx: optax.GradientTransformation) -> timing.Turn:
    """A compiled, donated training step."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        grad_fn = flatopt.make_grad_fn(problem.loss_fn, *batch)
        _, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.copy, problem.params)
    return timing.turn_of(jax.jit(step, donate_argnums=0), (params, tx.init(params)), problem.batch)


def lines(results: dict[str, Any]) -> list[str]:
    """Markdown: accuracy and flatness, then the times of a step."""
    rows = [
        "| off, % | method | weights not 0 | test accuracy, % | minus the dense one | train loss "
        "| top eigenvalue | SAM sharpness |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    dense = {a["sparsity"]: a for a in results["arms"] if a["method"] == DENSE}
    for arm in results["arms"]:
        other = dense.get(arm["sparsity"])
        gain = (
            "" if other in (None, arm) else _points(np.subtract(arm["accuracy"], other["accuracy"]))
        )
        rows.append(
            f"| {100 * arm['sparsity']:.0f} | {arm['method']} | {np.mean(arm['weights']):.0f} "
            f"| {Estimate.of(100 * np.array(arm['accuracy'])).show(2)} | {gain} "
            f"| {np.mean(arm['train_loss']):.2g} | {_number(arm['top_eigenvalue'])} "
            f"| {_number(arm['sam_sharpness'])} |"
        )
    columns = [(m, b) for m, bases in results["step_time"].items() for b in bases]
    head = " | ".join(f"{model}, {base}" for model, base in columns)
    rows += ["", f"| a step between changes, over the dense one's | {head} |"]
    rows += ["| --- |" + " ---: |" * len(columns)]
    times = [results["step_time"][model][base] for model, base in columns]
    for label in list(times[0])[1:]:
        cells = (variants[label]["over_base"] for variants in times)
        shown = (f"{c['median']:.2f} [{c['min']:.2f}, {c['max']:.2f}]" for c in cells)
        rows.append(f"| {label} | {' | '.join(shown)} |")
    return rows


def _points(differences: np.ndarray) -> str:
    return Estimate.of(100 * differences).show(2, "+")


def _number(values: Sequence[float]) -> str:
    """Mean and standard error to three digits of the mean."""
    estimate = Estimate.of(np.array(values))
    digits = max(0, 2 - math.floor(math.log10(max(abs(estimate.mean), 1e-12))))
    return estimate.show(digits)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="digits", help="digits, or a file of --data-dir (digits)")
    add("--data-dir", type=Path, default=os.environ.get("FLATOPT_DATA_DIR"),
        help="folder of .npz data sets, for all but digits ($FLATOPT_DATA_DIR)")  # fmt: skip
    add("--sparsities", type=float, nargs="+", default=SPARSITIES, help="(0.8 0.9 0.95 0.98)")
    add("--seeds", type=int, default=8, help="number of seeds, trained together (8)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add("--train-size", type=int, default=1000, help="training images of a seed (1000)")
    add("--steps", type=int, default=3000, help="updates of a run (3000)")
    add("--batch-size", type=int, default=32, help="images in a gradient (32)")
    add("--learning-rate", type=float, default=0.05, help="the highest (0.05)")
    add("--rounds", type=int, default=10, help="rounds of the step times (10)")
    add("--json", type=Path, required=True, help="where every number goes")
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "json")}
    results = {
        "settings": settings | {"rho": RHO, "fraction": FRACTION, "every": EVERY, "stop": STOP},
        "seeds": list(range(args.first_seed, args.first_seed + args.seeds)),
        "arms": arms(datasets.load(args.dataset, args.data_dir), args),
        "step_time": {
            name: step_times(problem(), args.rounds, 10) for name, problem in TIMED.items()
        },
    }
    print("\n".join(lines(results)))
    record.write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
