"""Wide flat regions of a perceptron whose weights are signs: three ways to a solution.

Random labels of random inputs are learnt by weights +-1. Plain training keeps latent real weights,
takes the gradient at their signs and gives it to them; replicated training couples the latent
weights of several copies; focusing belief propagation sends messages. How many errors come back
when a share of the signs is flipped says how wide the place is that they found.
`python -m examples.binary_perceptron` runs it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import flatopt
from examples import belief_propagation
from flatopt import measures
from flatopt.plots import COLOURS, STYLE

SHARES = (0.0, 0.02, 0.05, 0.1)  # Of the signs, flipped.
DRAWS = 200
# Chosen on seeds 0 to 3, the rate among 0.1, 0.3, 1, 3 and 10; the results are of other seeds.
LEARNING_RATE, BATCH = 10.0, 5
REPLICAS, STRENGTH, GROWTH = 7, 3e-3, 100.0


def loss(latent: jax.Array, patterns: jax.Array) -> jax.Array:
    """The hinge at the signs of the latent weights, whose gradient passes through the sign."""
    weights = latent + jax.lax.stop_gradient(jnp.where(latent > 0, 1.0, -1.0) - latent)
    return jnp.mean(jax.nn.relu(1e-3 - patterns @ weights / np.sqrt(patterns.shape[1])))


def error(weights: jax.Array, patterns: jax.Array) -> jax.Array:
    """Share of wrong labels."""
    return jnp.mean(patterns @ weights <= 0)


def _sgd(steps: int) -> optax.GradientTransformation:
    del steps
    return optax.sgd(LEARNING_RATE)


def _replicated_sgd(steps: int) -> optax.GradientTransformation:
    strength = flatopt.strength_schedule("exponential", STRENGTH, GROWTH * STRENGTH, steps=steps)
    return flatopt.replicated_sgd(_sgd(steps), REPLICAS, strength, std=1.0)


def train(
    tx: optax.GradientTransformation, patterns: jax.Array, steps: int, key: jax.Array
) -> jax.Array:
    """Trains latent weights; returns the first signs of theirs without an error, or the last."""
    tx = optax.with_extra_args_support(tx)
    start_key, key = jax.random.split(key)

    def gradient(latent: jax.Array, key: jax.Array) -> jax.Array:
        rows = jax.random.choice(key, len(patterns), (BATCH,), replace=False)
        return jax.grad(loss)(latent, patterns[rows])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        latent, state, weights = carry
        keys = jax.random.split(key)
        updates, state = tx.update(
            gradient(latent, keys[0]),
            state,
            latent,
            grad_fn=lambda p, i: gradient(p, jax.random.fold_in(keys[1], i)),
        )
        latent = optax.apply_updates(latent, updates)
        signs = jnp.where(flatopt.eval_params(state, latent) > 0, 1.0, -1.0)
        solved = error(weights, patterns) == 0
        return (latent, state, jnp.where(solved, weights, signs)), None

    latent = jax.random.normal(start_key, patterns.shape[1:])
    first = latent, tx.init(latent), jnp.where(latent > 0, 1.0, -1.0)
    (_, _, weights), _ = jax.lax.scan(step, first, jax.random.split(key, steps))
    return weights


Find = Callable[[jax.Array, int, jax.Array], jax.Array]
METHODS: dict[str, Find] = {
    "sgd": lambda patterns, evaluations, key: train(_sgd(evaluations), patterns, evaluations, key),
    "replicated_sgd": lambda patterns, evaluations, key: train(
        _replicated_sgd(evaluations // REPLICAS), patterns, evaluations // REPLICAS, key
    ),
    "focusing_bp": lambda patterns, _, key: belief_propagation.focus(patterns, key),
}


class Scores(NamedTuple):
    """What is measured of a solution.

    Attributes:
      train_errors: share of wrong labels.
      margin: the mean stability over the root of the number of inputs.
      flip_energy: rise of the errors when a share of the signs is flipped, at each of `SHARES`.
    """

    train_errors: jax.Array
    margin: jax.Array
    flip_energy: jax.Array


def measure(method: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Finds and measures the solutions of all seeds."""
    number = round(settings.load * settings.inputs)

    @jax.jit
    def run(seeds: jax.Array) -> Scores:
        def one(seed: jax.Array) -> Scores:
            data_key, train_key, flip_key = jax.random.split(jax.random.key(seed), 3)
            patterns = jax.random.rademacher(data_key, (number, settings.inputs), jnp.float32)
            weights = METHODS[method](patterns, settings.evaluations, train_key)
            energy = measures.flip_energy(
                error, weights, patterns[None], shares=SHARES, num_samples=DRAWS, key=flip_key
            )
            margin = jnp.mean(patterns @ weights) / np.sqrt(settings.inputs)
            return Scores(energy.error, margin, energy.energy)

        return jax.lax.map(one, seeds)

    seeds = jnp.arange(settings.first_seed, settings.first_seed + settings.seeds)
    scores = run(seeds)
    return {
        "method": method,
        **{name: np.asarray(values).tolist() for name, values in scores._asdict().items()},
    }


def table(arms: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: means over seeds, standard errors, seeds flatter than SGD's."""
    heads = [f"errors with {share:.0%} flipped" for share in SHARES[1:]]
    lines = [
        f"| method | solved | mean margin | {' | '.join(heads)} |",
        "| --- | --- | --- |" + len(heads) * " --- |",
    ]
    plain = np.array(arms[0]["flip_energy"])
    for arm in arms:
        energy = np.array(arm["flip_energy"])
        solved = int(np.sum(np.array(arm["train_errors"]) == 0))
        cells = [arm["method"], f"{solved} of {len(energy)}", _mean_and_error(arm["margin"])]
        for i in range(1, len(SHARES)):
            flatter = int(np.sum(energy[:, i] < plain[:, i]))
            note = "" if arm is arms[0] else f" (less than {arms[0]['method']}'s: {flatter})"
            cells.append(_mean_and_error(energy[:, i]) + note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_error(values: Any) -> str:
    values = np.asarray(values, float)
    spread = f"{values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else "n/a"
    return f"{values.mean():.4f} ± {spread}"


def draw(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture, errors over the share of flipped signs, to `path` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axis = figure.subplots()
        for arm, colour, dashes in zip(arms, COLOURS, ("-", "--", "-."), strict=False):
            values = np.array(arm["flip_energy"])
            spread = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
            look = {"color": colour, "linestyle": dashes, "label": arm["method"]}
            axis.errorbar(SHARES, values.mean(0), spread, **look)
        axis.set(
            title="Binary perceptron: errors after random flips",
            xlabel="share of the signs that is flipped",
            ylabel="rise of the training errors",
        )
        axis.legend()
        figure.savefig(path, dpi=130, metadata={"Software": None})


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.binary_perceptron", description=__doc__
    )
    add = parser.add_argument
    add("--seeds", type=int, default=8, help="number of seeds (8)")
    add("--first-seed", type=int, default=100, help="the first of them (100)")
    add("--inputs", type=int, default=201, help="number of weights (201)")
    add("--load", type=float, default=0.3, help="patterns over weights (0.3)")
    add("--evaluations", type=int, default=28_000, help="gradients of each training (28000)")
    add("--out", type=Path, default=Path("out/binary_perceptron.png"), help="the picture")
    return parser


def run(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every method, prints the table and draws the picture."""
    arms = [measure(method, settings) for method in METHODS]
    print(table(arms))
    draw(arms, settings.out)
    return arms


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
