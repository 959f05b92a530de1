"""Two Gaussian clouds, where the best classifier is known: who comes nearest to it?

Inputs are y c v + z with a label y = +-1, a unit vector v and normal noise z. A linear classifier
of direction w errs on a share Phi(-c cos(w, v)) of new inputs, and the best direction to be had
from the training data is the mean of y x. More inputs than patterns: every method reaches zero
errors. `python -m examples.gaussian_mixture` runs it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtr

import flatopt
from examples import perceptron

CENTRE = 1.5  # c: the distance of the clouds' centres from zero, in units of the noise.
PATTERNS = 100
RHO = 2.0  # Of SAM, for weights of length 10; no setting was tuned for these clouds.


def _sam(steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(perceptron.LEARNING_RATE, steps)
    return optax.chain(flatopt.sam(RHO), optax.sgd(schedule, momentum=perceptron.MOMENTUM))


METHODS = {**perceptron.METHODS, "sam": perceptron.Method(_sam, 2)}
ARMS = [*((name, "hinge") for name in METHODS), ("sgd", "logistic")]


class Scores(NamedTuple):
    """What is measured of a classifier.

    Attributes:
      train_errors: share of wrong labels.
      angle: to v, in degrees.
      test_errors: by the closed form.
    """

    train_errors: jax.Array
    angle: jax.Array
    test_errors: jax.Array


def make_problem(key: jax.Array) -> tuple[perceptron.Problem, jax.Array]:
    """Draws the clouds, the patterns and the first weights; returns v too."""
    centre_key, label_key, noise_key, start_key = jax.random.split(key, 4)
    v = jax.random.normal(centre_key, (perceptron.INPUTS,))
    v = v / jnp.linalg.norm(v)
    y = jax.random.rademacher(label_key, (PATTERNS,), jnp.float32)
    noise = jax.random.normal(noise_key, (PATTERNS, perceptron.INPUTS))
    data = perceptron.Data(CENTRE * y[:, None] * v[None] + noise, y)
    start = jax.random.normal(start_key, (1, perceptron.INPUTS))
    return perceptron.Problem(data, data, start), v


def score(problem: perceptron.Problem, v: jax.Array, params: jax.Array) -> Scores:
    """Measures one classifier."""
    cosine = params[0] @ v / jnp.linalg.norm(params)
    own = perceptron.errors(params, problem.train)
    return Scores(own, jnp.degrees(jnp.arccos(cosine)), ndtr(-CENTRE * cosine))


def measure(method: str, loss: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one arm on all seeds; "mean of y x" is computed, not trained."""

    @jax.jit
    def run(seeds: jax.Array) -> Scores:
        def one(seed: jax.Array) -> Scores:
            problem_key, train_key = jax.random.split(jax.random.key(seed))
            problem, v = make_problem(problem_key)
            if method not in METHODS:
                return score(problem, v, (problem.train.y @ problem.train.x)[None])
            chosen = METHODS[method]
            steps = settings.evaluations // chosen.evaluations
            given = perceptron.LOSSES[loss], chosen.build(steps), steps, settings.batch_size
            return score(problem, v, perceptron.train(problem, *given, train_key))

        return jax.vmap(one)(seeds)

    seeds = jnp.arange(settings.first_seed, settings.first_seed + settings.seeds)
    scores = run(seeds)._asdict().items()
    return {"method": method, "loss": loss, **{k: np.asarray(v).tolist() for k, v in scores}}


def table(arms: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: means over seeds and standard errors."""
    plain = np.array(arms[0]["angle"])
    lines = [
        "| method, loss | train errors | angle to the best, degrees | nearer than sgd, hinge "
        "| test errors |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in arms:
        angle = np.array(arm["angle"])
        cells = [
            f"{arm['method']}, {arm['loss']}" if arm["loss"] else arm["method"],
            f"{np.mean(arm['train_errors']):.3f}",
            f"{angle.mean():.1f} ± {angle.std(ddof=1) / len(angle) ** 0.5:.1f}",
            "" if arm is arms[0] else f"{np.sum(angle < plain)} of {len(angle)}",
            f"{np.mean(arm['test_errors']):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    name = "python -m examples.gaussian_mixture"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=16, help="number of seeds, trained together, >= 2 (16)")
    add("--first-seed", type=int, default=100, help="the first of them (100)")
    add("--evaluations", type=int, default=10_000, help="gradients of each run (10000)")
    add("--batch-size", type=int, default=20, help="patterns in a gradient (20)")
    return parser


def run(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every arm and prints the table."""
    arms = [measure(*arm, settings) for arm in [*ARMS, ("mean of y x", "")]]
    print(table(arms))
    return arms


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
