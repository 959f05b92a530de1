"""Wide flat minima of a perceptron and a committee machine: three optimisers side by side.

A teacher labels random inputs, and a student of the same shape learns them. Only the direction of a
unit's weights matters, and the loss is zero as soon as every label is right. So there is a whole
region of solutions, and where in it an optimiser stops is its own doing: near the edge, where a
small change of the weights costs errors, or further in. `python -m examples.perceptron` runs it.
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
from flatopt.plots import COLOURS, STYLE

INPUTS = 101
SHARPNESS = 2.0  # Of the hidden units: tanh(SHARPNESS * field), with fields of order 1.
TEST_SIZE = 5000
SIGMAS = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])  # Of the multiplicative noise.
DISTANCES = np.array([0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])  # Relative to the length of w.
DRAWS = 200


class Data(NamedTuple):
    """Patterns of one seed.

    Attributes:
      x: inputs, +-1, [number, INPUTS].
      y: labels, +-1, [number].
    """

    x: jax.Array
    y: jax.Array


class Problem(NamedTuple):
    """One seed's data and first weights."""

    train: Data
    test: Data
    params: jax.Array


def output(params: jax.Array, x: jax.Array) -> jax.Array:
    """The mean of the hidden units, each with weights of length 1 in units of the inputs' noise."""
    weights = params / jnp.linalg.norm(params, axis=1, keepdims=True)
    return jnp.mean(jnp.tanh(SHARPNESS * (x @ weights.T)), axis=1)


def hinge(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Zero once every label is right: it says nothing about margins."""
    return jnp.mean(jax.nn.relu(-y * output(params, x)))


def logistic(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Never zero: it goes on asking for larger margins."""
    return jnp.mean(jax.nn.softplus(-8.0 * y * output(params, x))) / 8.0


LOSSES: dict[str, Callable[..., jax.Array]] = {"hinge": hinge, "logistic": logistic}


def errors(params: jax.Array, data: Data) -> jax.Array:
    """Share of wrong labels."""
    return jnp.mean(output(params, data.x) * data.y <= 0)


def make_problem(key: jax.Array, patterns: int, hidden: int) -> Problem:
    """Draws a teacher, its labels and the student's first weights."""
    teacher_key, x_key, start_key = jax.random.split(key, 3)
    teacher = jax.random.normal(teacher_key, (hidden, INPUTS))
    x = jax.random.rademacher(x_key, (patterns + TEST_SIZE, INPUTS), jnp.float32)
    y = jnp.where(output(teacher, x) > 0, 1.0, -1.0)
    start = jax.random.normal(start_key, (hidden, INPUTS))
    return Problem(Data(x[:patterns], y[:patterns]), Data(x[patterns:], y[patterns:]), start)


class Method(NamedTuple):
    """One optimiser, and the gradients that one of its updates takes."""

    build: Callable[[int], optax.GradientTransformation]
    evaluations: int


# Chosen on seeds 0 to 3 of both machines, SGD's rate among 1, 3, 10, 30 and 100; the results are of
# other seeds.
LEARNING_RATE, MOMENTUM = 10.0, 0.9
INNER_STEPS, INNER_RATE, OUTER_RATE, AVERAGING = 20, 1000.0, 0.3, 0.9
GAMMA, NOISE = 1e-7, 3e-4
REPLICAS, STRENGTH = 5, 1e-4
GROWTH = 100.0  # Of gamma and of the strength over the run.


def _sgd(steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return optax.sgd(schedule, momentum=MOMENTUM)


def _entropy_sgd(steps: int) -> optax.GradientTransformation:
    inner = flatopt.local_entropy(
        INNER_STEPS,
        flatopt.strength_schedule("exponential", GAMMA, GROWTH * GAMMA, steps=steps),
        inner_learning_rate=INNER_RATE,
        noise=NOISE,
        averaging=AVERAGING,
    )
    return optax.chain(inner, optax.sgd(OUTER_RATE))


def _replicated_sgd(steps: int) -> optax.GradientTransformation:
    strength = flatopt.strength_schedule("exponential", STRENGTH, GROWTH * STRENGTH, steps=steps)
    return flatopt.replicated_sgd(_sgd(steps), REPLICAS, strength, std=1.0)


METHODS = {
    "sgd": Method(_sgd, 1),
    "entropy_sgd": Method(_entropy_sgd, INNER_STEPS),
    "replicated_sgd": Method(_replicated_sgd, REPLICAS),
}
# The last row is a control: a loss that asks for margins needs no other optimiser.
ARMS = [
    ("sgd", "hinge"),
    ("entropy_sgd", "hinge"),
    ("replicated_sgd", "hinge"),
    ("sgd", "logistic"),
]
MACHINES = {"perceptron": (1, 150), "committee": (3, 300)}  # Hidden units, patterns.


def train(
    problem: Problem,
    loss: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    key: jax.Array,
) -> jax.Array:
    """Trains one student; every gradient of an update has a minibatch of its own."""
    tx = optax.with_extra_args_support(tx)
    size = len(problem.train.y)

    def gradient(params: jax.Array, key: jax.Array) -> jax.Array:
        rows = jax.random.choice(key, size, (batch_size,), replace=False)
        return jax.grad(loss)(params, problem.train.x[rows], problem.train.y[rows])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        keys = jax.random.split(key)
        updates, opt_state = tx.update(
            gradient(params, keys[0]),
            opt_state,
            params,
            grad_fn=lambda p, i: gradient(p, jax.random.fold_in(keys[1], i)),
        )
        return (optax.apply_updates(params, updates), opt_state), None

    start = problem.params, tx.init(problem.params)
    (params, opt_state), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    return flatopt.eval_params(opt_state, params)


class Scores(NamedTuple):
    """What is measured of a student.

    Attributes:
      train_errors: share of wrong training labels.
      test_errors: share of wrong test labels.
      local_energy: rise of the training errors under multiplicative noise, at each of `SIGMAS`.
      solutions: share of solutions among random points at each of `DISTANCES`: the exponential of
        the local entropy, in units of that of all points there.
    """

    train_errors: jax.Array
    test_errors: jax.Array
    local_energy: jax.Array
    solutions: jax.Array


def score(problem: Problem, params: jax.Array, key: jax.Array) -> Scores:
    """Measures one student; the same key gives every method the same noise."""
    weights = params / jnp.linalg.norm(params, axis=1, keepdims=True)
    noise_key, direction_key = jax.random.split(key)
    own = errors(weights, problem.train)

    def noisy(sigma: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            kicked = weights * (1 + sigma * jax.random.normal(key, weights.shape))
            return errors(kicked, problem.train)

        return jnp.mean(jax.lax.map(one, jax.random.split(noise_key, DRAWS))) - own

    def near(distance: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            kick = jax.random.normal(key, weights.shape)
            kick = kick / jnp.linalg.norm(kick, axis=1, keepdims=True)
            return errors(weights + distance * kick, problem.train) == 0

        return jnp.mean(jax.lax.map(one, jax.random.split(direction_key, DRAWS)))

    return Scores(
        own,
        errors(weights, problem.test),
        jax.lax.map(noisy, jnp.asarray(SIGMAS, jnp.float32)),
        jax.lax.map(near, jnp.asarray(DISTANCES, jnp.float32)),
    )


def measure(machine: str, method: str, loss: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one arm on all seeds."""
    hidden, patterns = MACHINES[machine]
    chosen = METHODS[method]
    steps = settings.evaluations // chosen.evaluations

    @jax.jit
    def run(seeds: jax.Array) -> Scores:
        def one(seed: jax.Array) -> Scores:
            problem_key, train_key, score_key = jax.random.split(jax.random.key(seed), 3)
            problem = make_problem(problem_key, patterns, hidden)
            tx = chosen.build(steps)
            params = train(problem, LOSSES[loss], tx, steps, settings.batch_size, train_key)
            return score(problem, params, score_key)

        return jax.vmap(one)(seeds)

    seeds = jnp.arange(settings.first_seed, settings.first_seed + settings.seeds)
    scores = run(seeds)
    return {
        "machine": machine,
        "method": method,
        "loss": loss,
        "steps": steps,
        "gradient_evaluations_per_seed": steps * chosen.evaluations,
        **{name: np.asarray(values).tolist() for name, values in scores._asdict().items()},
    }


def table(arms: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: means over seeds and standard errors."""
    at_energy, at_distance = list(SIGMAS).index(0.3), list(DISTANCES).index(0.1)
    lines = [
        "| machine | method, loss | train errors | local energy, sigma 0.3 "
        "| solutions at distance 0.1 | test errors |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in arms:
        cells = [
            arm["machine"],
            f"{arm['method']}, {arm['loss']}",
            _mean_and_error(arm["train_errors"]),
            _mean_and_error(np.array(arm["local_energy"])[:, at_energy]),
            _mean_and_error(np.array(arm["solutions"])[:, at_distance]),
            _mean_and_error(arm["test_errors"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_error(values: Any) -> str:
    """The mean over seeds and its standard error; one seed has none."""
    values = np.asarray(values, float)
    error = f"{values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else "n/a"
    return f"{values.mean():.3f} ± {error}"


def make_figure(arms: Sequence[dict[str, Any]]) -> Figure:
    """Local energy and share of solutions around what each method found, one row a machine."""
    looks = [(COLOURS[0], "-"), (COLOURS[1], "--"), (COLOURS[2], "-."), ("0.55", ":")]
    styles = dict(zip(ARMS, looks, strict=True))
    names = list(dict.fromkeys(arm["machine"] for arm in arms))
    figure = Figure(figsize=(10, 3.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for arm in (a for a in arms if a["machine"] == name):
            colour, dashes = styles[arm["method"], arm["loss"]]
            label = f"{arm['method']}, {arm['loss']} loss"
            for axis, where, field in zip(
                row, (SIGMAS, DISTANCES), ("local_energy", "solutions"), strict=True
            ):
                values = np.array(arm[field])
                error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
                axis.errorbar(
                    where, values.mean(0), error, color=colour, linestyle=dashes, label=label
                )
        row[0].set(
            title=f"{name.capitalize()}: rise of the training errors under noise",
            xlabel="sigma of the multiplicative noise",
            ylabel="local energy",
        )
        row[1].set(
            title=f"{name.capitalize()}: solutions nearby",
            xlabel="relative distance",
            ylabel="share",
        )
        row[0].set_ylim(bottom=0)
    axes[0, 0].legend()
    return figure


def draw(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture to `path` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        make_figure(arms).savefig(path, dpi=130, metadata={"Software": None})


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    parser = argparse.ArgumentParser(prog="python -m examples.perceptron", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=16, help="number of seeds, trained together (16)")
    add("--first-seed", type=int, default=100, help="the first of them (100)")
    add("--evaluations", type=int, default=20_000, help="gradients of each run (20000)")
    add("--batch-size", type=int, default=30, help="patterns in a gradient (30)")
    add("--machines", default=",".join(MACHINES), help="comma-separated (both)")
    add("--out", type=Path, default=Path("out/perceptron.png"), help="the picture")
    return parser


def run(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every arm, prints the table and draws the picture."""
    arms = [
        measure(machine, *arm, settings) for machine in settings.machines.split(",") for arm in ARMS
    ]
    print(table(arms))
    draw(arms, settings.out)
    return arms


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
