"""The pictures of `docs/measures.md`: `python -m benchmarks.gallery` draws them anew.

Two small networks on scikit-learn's digits, each method on both; takes a minute or two.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import flatopt
from benchmarks.compare import datasets
from examples.models.mlp import MLP
from flatopt import curves, landscape, measures, plots

ROOT = Path(__file__).parent.parent
CORRELATION = ROOT / "benchmarks" / "results" / "sharpness_correlation.json"
WIDTHS, TRAIN, STEPS, BATCH = (64, 64), 300, 1500, 32
METHODS = {
    "sgd": optax.identity,
    "sam": lambda: flatopt.sam(0.2),
    "asam": lambda: flatopt.asam(1.0),
}
POINTS = 61
LEARNT = 0.1  # The training loss of the white line in `planes`.
LOWEST = 94.0  # In per cent: the accuracies of `correlation` that stand at the edge.
# Of `trajectory`: a constant rate, small batches and wrong labels keep the weights moving.
RATE, SMALL, NOISE, TOGETHER, APART, PART = 0.05, 8, 0.2, 600, 1000, 20


class Study:
    """Networks trained from two starts with each method, on three hundred digits."""

    def __init__(self, methods: list[str]):
        """Trains them all."""
        data = datasets.load("digits", None)
        self.model = MLP(hidden=WIDTHS)
        rows = np.random.default_rng(0).permutation(len(data.images))
        self.x = jnp.asarray(data.images[rows[:TRAIN]], jnp.float32) / 16
        self.y = jnp.asarray(data.labels[rows[:TRAIN]])
        self.batches = (self.x[None], self.y[None])  # One batch of all training images.
        others = jnp.asarray(data.images[rows[TRAIN:]], jnp.float32) / 16
        self.test = (others[None], jnp.asarray(data.labels[rows[TRAIN:]])[None])
        schedule = optax.cosine_decay_schedule(0.1, STEPS)
        self.networks = {
            (name, seed): self.train(
                optax.chain(METHODS[name](), optax.sgd(schedule, momentum=0.9)),
                self.start(seed),
                self.y,
                self.draws(STEPS, BATCH, seed),
            ).params
            for name in tqdm(methods, desc="training", leave=False)
            for seed in (0, 1)
        }

    def start(self, seed: int) -> Any:
        """First weights."""
        return self.model.init(jax.random.key(seed), self.x[:1])

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy."""
        logits = self.model.apply(params, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    def error(self, params: Any, batch: Any) -> jax.Array:
        """Wrong answers in per cent."""
        logits = jnp.asarray(self.model.apply(params, batch[0]))
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) != batch[1])

    def draws(self, steps: int, size: int, seed: int) -> np.ndarray:
        """Rows of the batches of a run."""
        return np.random.default_rng(seed).integers(0, TRAIN, size=(steps, size))

    def train(self, tx: Any, params: Any, labels: jax.Array, rows: np.ndarray) -> "Trained":
        """Trains on the batches of `rows`, with labels that need not be the right ones."""

        def step(carry: Any, rows: jax.Array) -> Any:
            params, opt_state = carry
            grad_fn = flatopt.make_grad_fn(self.loss, (self.x[rows], labels[rows]))
            updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), params

        start = (params, tx.init(params))
        (params, opt_state), path = jax.jit(lambda c, r: jax.lax.scan(step, c, r))(start, rows)
        return Trained(params, flatopt.eval_params(opt_state, params), path)


class Trained(NamedTuple):
    """The end of a run, and the way to it.

    Attributes:
      params: the last weights.
      mean: the weights to evaluate: their average, if the optimiser takes one.
      path: the weights after every update.
    """

    params: Any
    mean: Any
    path: Any


def spectrum(study: Study) -> Figure:
    """How many eigenvalues of the Hessian exceed each size."""
    figure, (panel,) = _figure(1)
    names = list(METHODS)
    results = {
        name: measures.spectral_density(study.loss, study.networks[name, 0], study.batches)
        for name in names
    }
    number = sum(leaf.size for leaf in jax.tree.leaves(study.networks[names[0], 0]))
    plots.spectrum(results, panel, num_params=number)
    panel.set_title(f"How many of the Hessian's {number} eigenvalues exceed a size")
    panel.set_xlabel("size of the eigenvalue")
    return figure


def planes(study: Study) -> Figure:
    """The loss around one solution: along its eigenvectors, and along random directions."""
    figure, panels = _figure(2)
    params = study.networks["sgd", 0]
    top = measures.top_eigenvalues(study.loss, params, study.batches, k=2)
    eigenvectors = [jax.tree.map(lambda leaf, i=i: leaf[i], top.vectors) for i in range(2)]
    # Unit eigenvectors, stretched to the length of the random directions: the same distances.
    random = [landscape.random_direction(key, params) for key in (0, 1)]
    length = optax.tree.norm(random[0])
    stretched = [optax.tree.scale(length, v) for v in eigenvectors]
    xs = np.linspace(-0.3, 0.3, POINTS)
    surfaces = [
        landscape.plane(
            study.loss,
            landscape.Plane(params, (directions[0], directions[1])),
            study.batches,
            xs=xs,
            ys=xs,
        )
        for directions in (stretched, random)
    ]
    # One scale for both, so that a colour is one loss.
    lowest, highest = float(np.min(surfaces)), float(np.max(surfaces))
    titles = ("the two top eigenvectors", "two random directions")
    for panel, losses, title in zip(panels, surfaces, titles, strict=True):
        plots.contours(xs, xs, losses, panel, lowest=lowest, highest=highest)
        panel.contour(xs, xs, losses, [LEARNT], colors="white", linewidths=1.5)
        panel.set_aspect("equal")
        panel.set_title(f"Loss along {title}")
    note = f"The same distances and colours on both sides; white: the training loss is {LEARNT:g}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=10, color="0.35")
    return figure


def trajectory(study: Study) -> Figure:
    """The plane through what SGD, SAM and SGD's average end at, after a common start."""
    figure, panels = _figure(2)
    labels = _noisy(study.y)
    sgd = optax.sgd(RATE, momentum=0.9)
    start = study.train(sgd, study.start(0), labels, study.draws(TOGETHER, SMALL, 0)).params
    rows = study.draws(APART, SMALL, 1)
    plain = study.train(optax.chain(sgd, flatopt.swa(every=PART)), start, labels, rows)
    sharp = study.train(optax.chain(flatopt.sam(0.2), sgd), start, labels, rows)
    networks = {"sgd": plain.params, "sam": sharp.params, "swa": plain.mean}
    where = landscape.plane_through(*networks.values())
    path = jax.tree.map(lambda leaf: leaf[::PART], plain.path)
    way = np.asarray(jax.vmap(lambda params: landscape.project(params, where))(path))
    corners = np.concatenate([where.coordinates, way[:1]])
    middle, reach = (corners.min(0) + corners.max(0)) / 2, 0.7 * np.ptp(corners, axis=0).max()
    xs, ys = (np.linspace(m - reach, m + reach, POINTS) for m in middle)
    parts = {
        "training loss": (study.loss, (study.x[None], labels[None])),
        "test error, %": (study.error, study.test),
    }
    for panel, (label, (function, batches)) in zip(panels, parts.items(), strict=True):
        values = landscape.plane(function, where, batches, xs=xs, ys=ys)
        here = jax.tree.map(lambda leaf: leaf[0], batches)
        names = [f"{n} {function(p, here):.3g}" for n, p in (networks | {"start": start}).items()]
        places = {name: tuple(place) for name, place in zip(names, corners, strict=True)}
        plots.contours(xs, ys, values, panel, trajectory=way, points=places, label=label)
        panel.set_aspect("equal")
        panel.set_title(f"{label.capitalize()}, around three solutions")
    note = "Line: sgd at a constant rate from the start that all share, projected; swa: its average"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=10, color="0.35")
    return figure


def _noisy(labels: jax.Array) -> jax.Array:
    """A share of them is wrong."""
    rng = np.random.default_rng(2)
    wrong = rng.permutation(TRAIN)[: round(NOISE * TRAIN)]
    return labels.at[wrong].set((labels[wrong] + rng.integers(1, 10, len(wrong))) % 10)


def barriers(study: Study) -> Figure:
    """Paths between two independently trained networks."""
    figure, (panel,) = _figure(1)
    first, second = study.networks["sgd", 0], study.networks["sgd", 1]
    units = measures.chain_units(first)
    aligned = measures.align_units(first, second, units).params
    controls = curves.control_points([first, second])
    rows = study.draws(2 * STEPS, BATCH, seed=2)
    controls = curves.train(
        study.loss,
        controls,
        optax.sgd(optax.cosine_decay_schedule(0.1, 2 * STEPS), momentum=0.9),
        [(study.x[r], study.y[r]) for r in rows],
        progress=True,
    )
    plots.profile(
        {
            "straight line": measures.linear_barrier(study.loss, first, second, study.batches),
            "straight, units aligned": measures.linear_barrier(
                study.loss, first, aligned, study.batches
            ),
            "Bezier curve": curves.evaluate(study.loss, controls, study.batches),
        },
        panel,
        ylabel="training loss",
        log=True,
    )
    panel.set_title("Training loss on three ways from one network to another")
    panel.set_xlabel("position on the way")
    panel.set_xlim(0, 1)
    return figure


def correlation(results: dict[str, Any]) -> Figure:
    """Accuracy against two measures, from the committed results."""
    figure, panels = _figure(2)
    runs = [run for run in results["runs"] if run["train_error"] <= 0.01]
    names = ("largest eigenvalue", "adaptive sharpness, worst")
    for panel, name in zip(panels, names, strict=True):
        flatness: dict[str, list[float]] = {}
        accuracy: dict[str, list[float]] = {}
        for run in runs:
            flatness.setdefault(run["optimizer"], []).append(run["measures"][name])
            accuracy.setdefault(run["optimizer"], []).append(100 * run["test_accuracy"])
        # One network of all is far below the others.
        plots.scatter(
            flatness, accuracy, panel, xlabel=name, ylabel="test accuracy, %", lowest=LOWEST
        )
        row = results["correlations"]["all"][name]
        panel.set_title(f"{name.capitalize()}: rank correlation {row['spearman']:+.2f}")
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, 4.2) if panels > 1 else (8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def main() -> None:
    """Draws every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery")
    parser.add_argument("--results", type=Path, default=CORRELATION)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(plots.STYLE):
        study = Study(list(METHODS))
        figures = {
            "spectrum": spectrum(study),
            "planes": planes(study),
            "trajectory": trajectory(study),
            "barriers": barriers(study),
            "correlation": correlation(json.loads(args.results.read_text())),
        }
        for name, figure in figures.items():
            figure.savefig(args.out / f"{name}.png", dpi=150, metadata={"Software": None})
            print("Written:", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
