"""Fast geometric ensembling on digits: one model, the mean of snapshots, the ensemble of them.

Run it with `python -m examples.fge`.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from examples import digits
from examples.models.mlp import MLP

TRAIN_SIZE, BATCH_SIZE, LABEL_NOISE = 300, 32, 0.2
EPOCH = TRAIN_SIZE // BATCH_SIZE
MAX_RATE, MIN_RATE, MOMENTUM = 0.1, 0.005, 0.9
CYCLE = 4 * EPOCH

model = MLP()


class Data(NamedTuple):
    """What a seed trains on and is tested on; images are flat.

    Attributes:
      x: the images of the batches, [steps, batch, pixels].
      y: their labels, a share of them wrong, [steps, batch].
      test: images and labels.
    """

    x: jax.Array
    y: jax.Array
    test: tuple[jax.Array, jax.Array]


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
    print("| evaluated | test accuracy, % | minus last, points |\n| --- | ---: | ---: |")
    for name, own in accuracy.items():
        gain = "" if own is last else _mean_and_error(own - last)
        print(f"| {name} | {_mean_and_error(own)} | {gain} |")
    print(f"Digits, {LABEL_NOISE:.0%} wrong training labels, {args.seeds} seeds ± standard error.")
    return 0


def run(seeds: int, epochs: int, cycles: int) -> dict[str, np.ndarray]:
    """Test accuracy of each seed: the last model, the models' mean, their ensemble."""
    first = epochs * EPOCH
    steps = first + cycles * CYCLE - CYCLE // 2  # Half a cycle to the first model.
    data = [draw(seed, steps) for seed in range(seeds)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    result = jax.jit(jax.vmap(functools.partial(one_seed, first=first)))(keys, stacked)
    order = ("last model", "mean of models", "ensemble")
    return {name: np.asarray(result[name]) for name in order}


def draw(seed: int, steps: int) -> Data:
    """One seed's images and batches."""
    data = digits.load(TRAIN_SIZE, seed)
    rng = np.random.default_rng([seed, 1])
    wrong = rng.permutation(TRAIN_SIZE)[: round(LABEL_NOISE * TRAIN_SIZE)]
    x, y = data.train
    y = y.at[wrong].set((y[wrong] + rng.integers(1, 10, len(wrong))) % 10)
    epochs = -(-steps * BATCH_SIZE // TRAIN_SIZE)
    order = np.concatenate([rng.permutation(TRAIN_SIZE) for _ in range(epochs)])
    rows = order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
    x, test = (images.reshape(len(images), -1) for images in (x, data.test[0]))
    return Data(x[rows], y[rows], (test, data.test[1]))


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits = model.apply(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def predict(params: Any, x: jax.Array) -> jax.Array:
    """Probabilities of the classes."""
    return jax.nn.softmax(jnp.asarray(model.apply(params, x)))


def one_seed(key: jax.Array, data: Data, first: int) -> dict[str, jax.Array]:
    """Trains for `first` steps at a constant rate, then collects a model a cycle."""
    tx = optax.sgd(MAX_RATE, momentum=MOMENTUM)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = model.init(key, data.x[0])
    start = (params, tx.init(params))
    (params, _), _ = jax.lax.scan(step, start, (data.x[:first], data.y[:first]))
    models = flatopt.fast_geometric_ensemble(
        loss_fn,
        params,
        (data.x[first:], data.y[first:]),
        period=CYCLE,
        max_learning_rate=MAX_RATE,
        min_learning_rate=MIN_RATE,
    )
    x, labels = data.test

    def accuracy(probabilities: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(probabilities, axis=-1) == labels)

    last = jax.tree.map(lambda leaf: leaf[-1], models)
    return {
        "last model": accuracy(predict(last, x)),
        "mean of models": accuracy(predict(flatopt.merge_params(models), x)),
        "ensemble": accuracy(flatopt.ensemble_predict(predict, models, x)),
    }


def _mean_and_error(shares: np.ndarray) -> str:
    """In per cent, the mean over seeds and its standard error; one seed has none."""
    error = f"{100 * shares.std(ddof=1) / len(shares) ** 0.5:.2f}" if len(shares) > 1 else "n/a"
    return f"{100 * shares.mean():.2f} ± {error}"


if __name__ == "__main__":
    sys.exit(main())
