"""The pictures of `docs/measures.md`: `python -m benchmarks.gallery` draws them anew.

Two small networks on scikit-learn's digits, each method on both; takes a minute or two.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
WIDTHS, TRAIN, STEPS, BATCH, PIECES = (64, 64), 300, 1500, 32, 50
METHODS = {
    "sgd": optax.identity,
    "sam": lambda: flatopt.sam(0.2),
    "asam": lambda: flatopt.asam(1.0),
}
POINTS = 31


class Study:
    """Networks trained from two starts with each method, and how they came there."""

    def __init__(self, methods: list[str]):
        """Trains them all."""
        data = datasets.load("digits", None)
        self.model = MLP(hidden=WIDTHS)
        rows = np.random.default_rng(0).permutation(len(data.images))[:TRAIN]
        self.x = jnp.asarray(data.images[rows], jnp.float32) / 16
        self.y = jnp.asarray(data.labels[rows])
        self.batches = (self.x[None], self.y[None])  # One batch of all training images.
        self.paths = {
            (name, seed): self._train(METHODS[name](), seed)
            for name in tqdm(methods, desc="training", leave=False)
            for seed in (0, 1)
        }

    def network(self, name: str, seed: int = 0) -> Any:
        """The trained weights."""
        return jax.tree.map(lambda leaf: leaf[-1], self.paths[name, seed])

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy."""
        logits = self.model.apply(params, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    def draws(self, steps: int, seed: int) -> np.ndarray:
        """Rows of the batches of a run."""
        return np.random.default_rng(seed).integers(0, TRAIN, size=(steps, BATCH))

    def _train(self, stage: Any, seed: int) -> Any:
        """The weights at the start and after each of `PIECES` pieces of the run."""
        schedule = optax.cosine_decay_schedule(0.1, STEPS)
        tx = optax.chain(stage, optax.sgd(schedule, momentum=0.9))
        params = self.model.init(jax.random.key(seed), self.x[:1])
        rows = jnp.asarray(self.draws(STEPS, seed)).reshape((PIECES, -1, BATCH))

        def step(carry: Any, rows: jax.Array) -> Any:
            params, opt_state = carry
            grad_fn = flatopt.make_grad_fn(self.loss, (self.x[rows], self.y[rows]))
            updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), opt_state), None

        def piece(carry: Any, rows: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, rows)
            return carry, carry[0]

        _, path = jax.jit(lambda c, r: jax.lax.scan(piece, c, r))((params, tx.init(params)), rows)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), params, path)


def spectrum(study: Study) -> Figure:
    """Densities of the Hessian's eigenvalues."""
    figure, (panel,) = _figure(1)
    results = {
        name: measures.spectral_density(study.loss, study.network(name), study.batches)
        for name in ("sgd", "asam")
    }
    plots.density(results, panel)
    panel.set_title("Density of the Hessian's eigenvalues")
    return figure


def planes(study: Study) -> Figure:
    """The loss around one solution: along its eigenvectors, and along random directions."""
    figure, panels = _figure(2)
    params = study.network("sgd")
    top = measures.top_eigenvalues(study.loss, params, study.batches, k=2)
    eigenvectors = [jax.tree.map(lambda leaf, i=i: leaf[i], top.vectors) for i in range(2)]
    # Unit eigenvectors, stretched to the length of the random directions: the same distances.
    random = [landscape.random_direction(key, params) for key in (0, 1)]
    length = optax.tree.norm(random[0])
    stretched = [optax.tree.scale(length, v) for v in eigenvectors]
    xs = np.linspace(-0.3, 0.3, POINTS)
    titles = ("two top eigenvectors", "two random directions, filter-normalised")
    for panel, directions, title in zip(panels, (stretched, random), titles, strict=True):
        where = landscape.Plane(params, (directions[0], directions[1]))
        losses = landscape.plane(study.loss, where, study.batches, xs=xs, ys=xs)
        plots.contours(xs, xs, losses, panel, highest=10.0)
        panel.set_title(f"Loss along {title}")
    return figure


def trajectory(study: Study) -> Figure:
    """The plane through the start and two solutions, with the way to the first of them."""
    figure, (panel,) = _figure(1)
    start = jax.tree.map(lambda leaf: leaf[0], study.paths["sgd", 0])
    networks = {"start": start, "sgd": study.network("sgd"), "sam": study.network("sam")}
    where = landscape.plane_through(*networks.values())
    corners = np.asarray(where.coordinates)
    (low, high), margin = (corners.min(0), corners.max(0)), 0.25 * np.ptp(corners, axis=0)
    xs, ys = (np.linspace(low[i] - margin[i], high[i] + margin[i], POINTS) for i in range(2))
    losses = landscape.plane(study.loss, where, study.batches, xs=xs, ys=ys)
    path = jax.vmap(lambda params: landscape.project(params, where))(study.paths["sgd", 0])
    places = {name: tuple(corner) for name, corner in zip(networks, corners, strict=True)}
    plots.contours(xs, ys, losses, panel, trajectory=path, points=places, highest=10.0)
    panel.set_title("SGD's way, projected")
    return figure


def barriers(study: Study) -> Figure:
    """Paths between two independently trained networks."""
    figure, (panel,) = _figure(1)
    first, second = study.network("sgd", 0), study.network("sgd", 1)
    units = measures.chain_units(first)
    aligned = measures.align_units(first, second, units).params
    controls = curves.control_points([first, second])
    rows = study.draws(2 * STEPS, seed=2)
    controls = curves.train(
        study.loss,
        controls,
        optax.sgd(optax.cosine_decay_schedule(0.1, 2 * STEPS), momentum=0.9),
        [(study.x[r], study.y[r]) for r in rows],
        progress=True,
    )
    plots.profile(
        {
            "straight": measures.linear_barrier(study.loss, first, second, study.batches),
            "straight, aligned": measures.linear_barrier(study.loss, first, aligned, study.batches),
            "Bezier curve": curves.evaluate(study.loss, controls, study.batches),
        },
        panel,
        ylabel="training loss",
    )
    panel.set_title("Ways between two networks")
    return figure


def correlation(results: dict[str, Any]) -> Figure:
    """Accuracy against two measures, from the committed results."""
    figure, panels = _figure(2)
    runs = [run for run in results["runs"] if run["train_error"] <= 0.01]
    for panel, name in zip(
        panels, ("largest eigenvalue", "adaptive sharpness, worst"), strict=True
    ):
        flatness: dict[str, list[float]] = {}
        accuracy: dict[str, list[float]] = {}
        for run in runs:
            flatness.setdefault(run["optimizer"], []).append(run["measures"][name])
            accuracy.setdefault(run["optimizer"], []).append(100 * run["test_accuracy"])
        plots.scatter(flatness, accuracy, panel, xlabel=name, ylabel="test accuracy, %")
        row = results["correlations"]["all"][name]
        panel.set_title(f"rank correlation {row['spearman']:+.2f}")
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.6 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def main() -> None:
    """Draws every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery")
    parser.add_argument("--results", type=Path, default=CORRELATION)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(list(METHODS))
    figures = {
        "spectrum": spectrum(study),
        "planes": planes(study),
        "trajectory": trajectory(study),
        "barriers": barriers(study),
        "correlation": correlation(json.loads(args.results.read_text())),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=80)
        print("Written:", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
