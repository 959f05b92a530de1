"""The top eigenvalue of a batch's Hessian, over the size of the batch.

`python -m benchmarks.batch_hessian --json benchmarks/results/batch_hessian.json`. Networks are
trained on digits; at several moments of a run the Hessian of the loss of random batches is measured
beside that of all training images, and two laws are fitted to how the surplus falls.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from benchmarks import record
from benchmarks.compare.report import Estimate
from benchmarks.sparse import init, loss
from examples import digits

WIDTHS = (64, 48, 10)
SIZES = (8, 16, 32, 64, 128, 256, 512)
LEARNING_RATE, BATCH = 0.1, 64
LAWS = {"c / sqrt(B)": 0.5, "c / B": 1.0}


def _train(key: jax.Array, train: tuple[jax.Array, jax.Array], moments: Sequence[int]) -> Any:
    """The weights after so many steps of SGD, stacked."""
    start, batches = jax.random.split(key)
    params, found, done = init(start, WIDTHS), [], 0
    x, labels = train

    def step(params: Any, key: jax.Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        grads = jax.grad(loss)(params, x[rows], labels[rows])
        return optax.tree.add_scale(params, -LEARNING_RATE, grads), None

    for moment in moments:
        keys = jax.random.split(jax.random.fold_in(batches, moment), moment - done)
        params, _ = jax.lax.scan(step, params, keys)
        found.append(params)
        done = moment
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _top(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The top eigenvalue on one batch."""
    batch = x[None], labels[None]
    found = flatopt.measures.top_eigenvalues(lambda w, b: loss(w, *b), params, batch)
    return found.values[0]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One compiled program a batch size: all moments, seeds and batches of it."""
    images, labels = digits.load().train
    train = images.reshape(len(images), -1), labels
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    params = jax.jit(jax.vmap(lambda key: _train(key, train, args.moments)))(keys)

    def at(params: Any, key: jax.Array, size: int) -> jax.Array:
        rows = jax.random.permutation(key, len(labels))[:size]
        return _top(params, train[0][rows], labels[rows])

    def all_of(size: int) -> jax.Array:
        def one(params: Any, key: jax.Array) -> jax.Array:
            draws = jax.random.split(jax.random.fold_in(key, size), args.batches)
            return jax.lax.map(lambda key: at(params, key, size), draws)

        # Batches of their own for each seed and moment: standard errors are over seeds.
        own = jax.vmap(lambda key: jax.random.split(key, len(args.moments)))(keys)
        return jax.jit(jax.vmap(jax.vmap(one)))(params, own)

    whole = jax.jit(jax.vmap(jax.vmap(lambda w: _top(w, *train))))(params)
    return {
        "settings": {
            "widths": WIDTHS,
            "learning_rate": LEARNING_RATE,
            "training_batch": BATCH,
            "moments": list(args.moments),
            "batches": args.batches,
            "train_size": len(labels),
        },
        "seeds": seeds,
        # [seeds, moments], and [seeds, moments, batches] for each size.
        "whole": np.asarray(whole, float).round(5).tolist(),
        "batch": {str(n): np.asarray(all_of(n), float).round(5).tolist() for n in args.sizes},
    }


def unexplained(results: dict[str, Any]) -> dict[str, np.ndarray]:
    r"""[moments] for each law: what it leaves of the surplus over the whole, a share in [0, 1].

    The surplus of batches of B among N images, averaged over them and the seeds, is fitted by
    :math:`c \, x^p` with :math:`x = 1/B - 1/N`, to which the variance of such a batch is
    proportional. The share is that of its squares.
    """
    whole = np.array(results["whole"]).mean(0)
    sizes = np.array([int(n) for n in results["batch"]])
    surplus = np.stack([np.mean(x, (0, 2)) for x in results["batch"].values()]) - whole
    left = (1 / sizes - 1 / results["settings"]["train_size"])[:, None]
    found = {}
    for law, power in LAWS.items():
        x = left**power
        factor = (x * surplus).sum(0) / (x * x).sum(0)
        found[law] = ((surplus - factor * x) ** 2).sum(0) / (surplus**2).sum(0)
    return found


def lines(results: dict[str, Any]) -> list[str]:
    """Markdown: a row a batch size, over the eigenvalue of all training images."""
    moments = results["settings"]["moments"]
    whole = np.array(results["whole"])
    head = " | ".join(f"after {n} steps" for n in moments)
    rows = [f"| batch | {head} |", "| ---: |" + " ---: |" * len(moments)]
    for size, values in results["batch"].items():
        ratio = np.mean(values, -1) / whole
        rows.append(f"| {size} | {' | '.join(Estimate.of(r).show(3) for r in ratio.T)} |")
    rows.append("| all, the eigenvalue | " + " | ".join(_number(v) for v in whole.T) + " |")
    for law, shares in unexplained(results).items():
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        rows.append(f"| surplus not explained by {law} | {cells} |")
    return rows


def _number(values: np.ndarray) -> str:
    digits = max(0, 2 - math.floor(math.log10(values.mean())))
    return Estimate.of(values).show(digits)


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_hessian", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=8, help="number of networks (8)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add("--batches", type=int, default=16, help="random batches of each size (16)")
    add("--sizes", type=int, nargs="+", default=SIZES, help="of the batches (8 to 512)")
    add("--moments", type=int, nargs="+", default=(10, 100, 1000), help="steps made (10 100 1000)")
    add("--json", type=Path, required=True, help="where every number goes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    results = measure(args)
    print("\n".join(lines(results)))
    record.write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
