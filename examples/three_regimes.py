"""Training on the sphere: what a fixed effective learning rate makes of a scale-invariant network.

Every layer but the last is normalised, so only the direction of its weights matters; they live on
the unit sphere, the last layer stands still, and the effective learning rate never changes. Small
rates converge, a middle one wanders at a level of its own, large ones never learn. All rates and
seeds are one compiled program. `python -m examples.three_regimes` runs it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import flatopt
from examples import digits
from flatopt.plots import COLOURS, STYLE, tick_powers

RATES = np.logspace(-4.0, 0.0, 13)
WIDTH = 64
HEAD_NORM = 10.0
SHOWN = (0, 3, 6, 7, 8, 9, 12)  # Of `RATES`, as curves.

Params = dict[str, jax.Array]


class Run(NamedTuple):
    """What is recorded of one run.

    Attributes:
      loss: [windows], mean loss of the batches of each window of steps.
      gradient_norm: [windows], the same of the norm of the gradient.
      train_loss: of all training images, at the end.
      test_accuracy: at the end.
      error: `measures.scale_invariance_error` at the end.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    train_loss: jax.Array
    test_accuracy: jax.Array
    error: jax.Array


def normalise(x: jax.Array, like: jax.Array) -> jax.Array:
    """BatchNorm without scale and shift, by the statistics of `like`."""
    variance = jnp.var(like, axis=0, keepdims=True)
    return (x - jnp.mean(like, axis=0, keepdims=True)) / jnp.sqrt(variance + 1e-5)


def logits(params: Params, head: jax.Array, x: jax.Array, like: jax.Array) -> jax.Array:
    """The network on `x`, normalised as `like` asks for: the batch itself, or all images."""
    for name in ("first", "second"):
        x, like = x @ params[name], like @ params[name]
        x, like = jax.nn.relu(normalise(x, like)), jax.nn.relu(normalise(like, like))
    return x @ head


def loss(params: Params, head: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of a batch."""
    found = logits(params, head, x, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, labels))


def start(key: jax.Array) -> tuple[Params, jax.Array]:
    """Weights on the unit sphere, all together, and the last layer of norm `HEAD_NORM`."""
    keys = jax.random.split(key, 3)
    params = {
        "first": jax.random.normal(keys[0], (64, WIDTH)),
        "second": jax.random.normal(keys[1], (WIDTH, WIDTH)),
    }
    head = jax.random.normal(keys[2], (WIDTH, 10))
    return (
        optax.tree.scale(1 / optax.tree.norm(params), params),
        HEAD_NORM * head / optax.tree.norm(head),
    )


def train(rate: jax.Array, key: jax.Array, data: digits.Digits, args: Any) -> Run:
    """One run at one rate."""
    (x, labels), (test_x, test_labels) = data
    tx = flatopt.fixed_elr(rate)
    start_key, batch_key = jax.random.split(key)
    params, head = start(start_key)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = carry
        rows = jax.random.randint(key, (args.batch_size,), 0, len(x))
        value, grads = jax.value_and_grad(loss)(params, head, x[rows], labels[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        seen = jnp.stack([value, optax.tree.norm(grads)])
        return (optax.apply_updates(params, updates), opt_state), seen

    def window(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
        carry, seen = jax.lax.scan(step, carry, keys)
        return carry, jnp.mean(seen, axis=0)

    keys = jax.random.split(batch_key, (args.windows, args.steps // args.windows))
    (params, _), seen = jax.lax.scan(window, (params, tx.init(params)), keys)
    right = jnp.argmax(logits(params, head, test_x, x), axis=-1) == test_labels
    error = flatopt.measures.scale_invariance_error(
        lambda w, batch: loss(w, head, *batch), params, (x[None], labels[None])
    )
    losses, norms = seen.T
    return Run(losses, norms, loss(params, head, x, labels), jnp.mean(right), error)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rates and seeds as one compiled program."""
    flat = jax.tree.map(lambda a: a.reshape(len(a), -1) if a.ndim > 1 else a, digits.load())

    @jax.jit
    def run(rates: jax.Array, seeds: jax.Array) -> Run:
        def one(rate: jax.Array, seed: jax.Array) -> Run:
            return train(rate, jax.random.key(seed), flat, args)

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, seeds)

    seeds = np.arange(args.first_seed, args.first_seed + args.seeds)
    found = run(jnp.asarray(RATES, jnp.float32), jnp.asarray(seeds))
    fields = {name: np.asarray(x, float).round(6).tolist() for name, x in found._asdict().items()}
    return {"seeds": seeds.tolist(), "rates": RATES.tolist(), "steps": args.steps, **fields}


def level(results: dict[str, Any]) -> np.ndarray:
    """[rates, seeds], the running loss over the last tenth of the steps."""
    curves = np.array(results["loss"])
    return curves[..., -max(1, curves.shape[-1] // 10) :].mean(-1)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds and standard errors."""
    lines = [
        "| ELR | running loss, last tenth | loss of all training images | gradient norm "
        "| test accuracy, % |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    accuracy, train_loss = np.array(results["test_accuracy"]), np.array(results["train_loss"])
    norm = np.array(results["gradient_norm"])[..., -1]
    for rate, *row in zip(
        results["rates"], level(results), train_loss, norm, accuracy, strict=True
    ):
        running, whole, slope, right = row
        lines.append(
            f"| {rate:.2g} | {_show(running, 4)} | {_show(whole, 4)} | {_show(slope, 2)} "
            f"| {_show(100 * right, 1)} |"
        )
    return "\n".join(lines)


def _show(values: np.ndarray, digits: int) -> str:
    """Mean over seeds and standard error; one seed has none."""
    error = f"{values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else "n/a"
    return f"{values.mean():.{digits}f} ± {error}"


def make_figure(results: dict[str, Any]) -> Figure:
    """Where runs end over the effective learning rate, and how they get there."""
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes = figure.subplots(2, 2)
    rates, found = np.array(results["rates"]), np.array(results["test_accuracy"])
    ends = (
        (axes[0, 0], level(results), "Running loss, last tenth of the run", "loss"),
        (axes[0, 1], 100 * found, "Test accuracy at the end", "%"),
        (
            axes[1, 0],
            np.array(results["gradient_norm"])[..., -1],
            "Gradient norm, end of the run",
            "norm on the unit sphere",
        ),
    )
    for axis, values, title, unit in ends:
        axis.plot(rates, values, "o", color="0.65", markersize=4)
        axis.plot(rates, values.mean(1), "-", color=COLOURS[1])
        axis.set(xscale="log", title=title, xlabel="effective learning rate", ylabel=unit)
        tick_powers(axis.xaxis)
    for axis in (axes[0, 0], axes[1, 0]):
        axis.set_yscale("log")
        tick_powers(axis.yaxis)
    curves = np.array(results["loss"]).mean(1)
    steps = (np.arange(curves.shape[1]) + 0.5) * results["steps"] / curves.shape[1]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(SHOWN)))
    for number, shade in zip(SHOWN, shades, strict=True):
        axes[1, 1].plot(steps, curves[number], color=shade, label=f"{rates[number]:.1e}")
    axes[1, 1].set(yscale="log", title="Running loss, by effective learning rate", xlabel="step")
    tick_powers(axes[1, 1].yaxis)
    figure.legend(*axes[1, 1].get_legend_handles_labels(), ncols=7, loc="outside lower center")
    return figure


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture to `path` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        make_figure(results).savefig(path, dpi=130, metadata={"Software": None})


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    parser = argparse.ArgumentParser(prog="python -m examples.three_regimes", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=4, help="number of seeds, trained together (4)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add("--steps", type=int, default=6000, help="updates of each run (6000)")
    add("--windows", type=int, default=60, help="points of a curve (60)")
    add("--batch-size", type=int, default=64, help="images in a gradient (64)")
    add("--out", type=Path, default=Path("out/three_regimes.png"), help="the picture")
    return parser


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and draws the picture."""
    results = measure(settings)
    print(table(results))
    draw(results, settings.out)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
