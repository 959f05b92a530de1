"""A phase diagram of the loss landscape: load against temperature, 36 kinds of runs at once.

Load is how many weights a network has for its images: the width of its two hidden layers.
Temperature is the noise of its gradients: the number of images in a batch. Of each cell three
seeds are trained, on labels of which a tenth is wrong, and four things are measured: the training
loss, the top eigenvalue of the Hessian, whether a curve connects two seeds (signed mode
connectivity) and how alike their outputs are (CKA). `python -m examples.phase_diagram` runs it.
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
import scipy.stats
from matplotlib.figure import Figure

from examples import digits
from flatopt import curves, measures
from flatopt.plots import STYLE

WIDTHS = (2, 4, 8, 16, 32, 64)
BATCH_SIZES = (128, 64, 32, 16, 8, 4)  # From cold to hot.
SEEDS = 3
WRONG = 0.1  # The share of training labels that are drawn anew.
CONNECTED = -1.0  # Points of error: below it, a barrier.
NO_SPREAD = 1e-6  # Outputs whose variance is below it are one and the same for all images.

Params = list[jax.Array]


class Cell(NamedTuple):
    """What is measured of one width and batch size.

    Attributes:
      train_loss: [seeds], cross-entropy of the training images with their labels.
      train_error: [seeds], per cent.
      test_accuracy: [seeds], per cent.
      sharpness: [seeds], top eigenvalue of the Hessian of the training loss.
      connectivity: [pairs], signed, points of training error; negative: a barrier.
      cka: [pairs], of the softmax outputs on test images; NaN where a network's are constant.
    """

    train_loss: jax.Array
    train_error: jax.Array
    test_accuracy: jax.Array
    sharpness: jax.Array
    connectivity: jax.Array
    cka: jax.Array


def start(key: jax.Array, unit: jax.Array) -> Params:
    """He's initial weights for as many units as `unit` has ones; the others are zero and stay."""
    number, widest = jnp.sum(unit), len(unit)
    keys = jax.random.split(key, 3)
    first = jax.random.normal(keys[0], (64, widest)) * jnp.sqrt(2 / 64) * unit
    second = jax.random.normal(keys[1], (widest, widest)) * jnp.sqrt(2 / number)
    last = jax.random.normal(keys[2], (widest, 10)) * jnp.sqrt(1 / number) * unit[:, None]
    zeros = [jnp.zeros(widest), jnp.zeros(widest), jnp.zeros(10)]
    return [first, zeros[0], second * unit * unit[:, None], zeros[1], last, zeros[2]]


def logits(params: Params, x: jax.Array) -> jax.Array:
    """The network. Units whose weights are zero have no gradient, so all widths share a program."""
    first, first_bias, second, second_bias, last, last_bias = params
    x = jax.nn.relu(x @ first + first_bias)
    x = jax.nn.relu(x @ second + second_bias)
    return x @ last + last_bias


def loss(params: Params, x: jax.Array, labels: jax.Array, share: jax.Array | None = None) -> Any:
    """Mean cross-entropy; `share` weighs the images, and sums to one."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)
    return jnp.mean(each) if share is None else jnp.sum(share * each)


def error(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of images on the wrong side, per cent."""
    return 100 * jnp.mean(jnp.argmax(logits(params, x), axis=-1) != labels)


def train(params: Params, batch_size: jax.Array, key: jax.Array, train_set: Any, args: Any) -> Any:
    """SGD with momentum, its rate cut to a tenth after half and again after three quarters."""
    x, labels = train_set
    cuts = {args.steps // 2: 0.1, 3 * args.steps // 4: 0.1}
    tx = optax.sgd(optax.piecewise_constant_schedule(args.rate, cuts), momentum=0.9)
    widest = max(BATCH_SIZES)
    share = (jnp.arange(widest) < batch_size) / batch_size

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        rows = jax.random.randint(key, (widest,), 0, len(x))
        grads = jax.grad(loss)(params, x[rows], labels[rows], share)
        # Small batches of a narrow network would throw it far away now and then.
        grads = optax.tree.scale(1 / jnp.maximum(1.0, optax.tree.norm(grads)), grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, args.steps)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params


def connect(ends: tuple[Params, Params], key: jax.Array, train_set: Any, args: Any) -> jax.Array:
    """Trains a curve with one bend between two networks; its signed mode connectivity."""
    x, labels = train_set
    controls = curves.control_points(ends)
    value = curves.curve_loss(loss)
    tx = curves.keep_fixed(optax.adam(0.01))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        controls, opt_state = carry
        place, rows = jax.random.split(key)
        picked = jax.random.randint(rows, (max(BATCH_SIZES),), 0, len(x))
        t = jax.random.uniform(place)
        grads = jax.grad(value)(controls, t, x[picked], labels[picked])
        updates, opt_state = tx.update(grads, opt_state, controls)
        return (optax.apply_updates(controls, updates), opt_state), None

    keys = jax.random.split(key, args.curve_steps)
    (controls, _), _ = jax.lax.scan(step, (controls, tx.init(controls)), keys)
    places = jnp.linspace(0.0, 1.0, 5)
    errors = jax.vmap(lambda t: error(curves.point(controls, t), x, labels))(places)
    return measures.mode_connectivity(errors)


def alike(params: Params, other: Params, x: jax.Array) -> jax.Array:
    """CKA of the softmax outputs; NaN, and no number, where a network says always the same."""
    outputs = lambda w, x: jax.nn.softmax(logits(w, x))  # noqa: E731
    found = measures.cka(outputs, params, other, x[None], estimator="biased")
    spread = jnp.stack([jnp.max(jnp.var(outputs(w, x), axis=0)) for w in (params, other)])
    return jnp.where(jnp.min(spread) > NO_SPREAD, found, jnp.nan)


def cell(width: jax.Array, batch_size: jax.Array, data: digits.Digits, args: Any) -> Cell:
    """Three seeds of one width and batch size, and their pairs."""
    train_set, test_set = data
    unit = (jnp.arange(max(WIDTHS)) < width).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(args.first_seed), 3 * SEEDS).reshape(3, SEEDS)
    begun = jax.vmap(start, (0, None))(keys[0], unit)
    trained = jax.vmap(lambda w, key: train(w, batch_size, key, train_set, args))(begun, keys[1])
    others = jax.tree.map(lambda w: jnp.roll(w, 1, axis=0), trained)

    def sharpness(params: Params) -> jax.Array:
        batch = jax.tree.map(lambda a: a[None], train_set)
        call = lambda w, batch: loss(w, *batch)  # noqa: E731
        return measures.top_eigenvalues(call, params, batch, num_steps=20).values[0]

    return Cell(
        jax.vmap(lambda w: loss(w, *train_set))(trained),
        jax.vmap(lambda w: error(w, *train_set))(trained),
        jax.vmap(lambda w: 100 - error(w, *test_set))(trained),
        jax.vmap(sharpness)(trained),
        jax.vmap(lambda a, b, k: connect((a, b), k, train_set, args))(trained, others, keys[2]),
        jax.vmap(lambda a, b: alike(a, b, test_set[0]))(trained, others),
    )


def load(args: Any) -> digits.Digits:
    """Digits as rows of numbers, a tenth of the training labels drawn anew."""
    (x, labels), (test_x, test_labels) = digits.load(args.train_size)
    rng = np.random.default_rng(args.first_seed)
    drawn = rng.integers(0, 10, len(labels))
    noisy = np.where(rng.random(len(labels)) < WRONG, drawn, labels)
    flat = [jnp.reshape(a, (len(a), -1)) for a in (x, test_x)]
    return digits.Digits((flat[0], jnp.asarray(noisy)), (flat[1], test_labels))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cells as one compiled program: [widths, batch sizes, seeds or pairs]."""
    data = load(args)

    @jax.jit
    def run(widths: jax.Array, sizes: jax.Array) -> Cell:
        one = lambda width, size: cell(width, size, data, args)  # noqa: E731
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(widths, sizes)

    found = run(jnp.array(WIDTHS), jnp.array(BATCH_SIZES, jnp.float32))
    fields = {name: _listed(x) for name, x in found._asdict().items()}
    settings = {"steps": args.steps, "curve_steps": args.curve_steps, "rate": args.rate}
    sizes = {"widths": list(WIDTHS), "batch_sizes": list(BATCH_SIZES)}
    first = args.first_seed
    return {"seeds": list(range(first, first + SEEDS)), **sizes, "settings": settings, **fields}


def _listed(values: jax.Array) -> Any:
    """Nested lists, None for what is not a number."""
    found = np.asarray(values, float).round(6).astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def means(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """[widths, batch sizes], means over seeds or pairs; NaN where one of them has no number."""
    return {name: np.array(results[name], float).mean(-1) for name in Cell._fields}


def phases(results: dict[str, Any]) -> np.ndarray:
    """[widths, batch sizes], the phase of each cell in words.

    Connected: no barrier of more than a point. Flat and similar: on the better side of the median
    of all cells, since neither measure has a number that would mean the same elsewhere.
    """
    found = means(results)
    flat = found["sharpness"] <= np.median(found["sharpness"])
    similar = found["cka"] >= np.nanmedian(found["cka"])  # What is undefined is not.
    words = [
        np.where(found["connectivity"] >= CONNECTED, "connected", "barrier"),
        np.where(flat, "flat", "sharp"),
        np.where(similar, "similar", "dissimilar"),
    ]
    named = zip(*(w.ravel() for w in words), strict=True)
    return np.array([", ".join(three) for three in named]).reshape(flat.shape)


def correlations(results: dict[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation of each measure with the test accuracy, over the cells."""
    found = means(results)
    kept = np.isfinite(found["cka"])
    names = ("train_loss", "sharpness", "connectivity", "cka")
    return {
        name: float(scipy.stats.spearmanr(found[name][kept], found["test_accuracy"][kept])[0])
        for name in names
    }


def table(results: dict[str, Any]) -> str:
    """The phases as Markdown, the best first, and what goes with the test accuracy."""
    found, names = means(results), phases(results)
    lines = [
        "| phase | cells | test accuracy, % | training loss | top eigenvalue "
        "| connectivity, points | CKA |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = sorted(set(names.ravel()), key=lambda n: -found["test_accuracy"][names == n].mean())
    for name in order:
        own = {field: values[names == name] for field, values in found.items()}
        likeness = own["cka"][np.isfinite(own["cka"])]
        lines.append(
            f"| {name} | {len(own['cka'])} | {own['test_accuracy'].mean():.1f} "
            f"| {own['train_loss'].mean():.3f} | {np.median(own['sharpness']):.3g} "
            f"| {own['connectivity'].mean():+.1f} "
            f"| {f'{likeness.mean():.2f}' if len(likeness) else 'undefined'} |"
        )
    ranks = correlations(results)
    shown = ", ".join(f"{name.replace('_', ' ')} {rank:+.2f}" for name, rank in ranks.items())
    return "\n".join([*lines, "", f"Rank correlation with the test accuracy: {shown}."])


def make_figure(results: dict[str, Any]) -> Figure:
    """Four pictures of the same cells."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    found = means(results)
    shown = (
        ("train_loss", "Training loss", "viridis_r", "{:.2f}"),
        ("sharpness", "Top eigenvalue, log10", "viridis_r", "{:.1f}"),
        ("connectivity", "Mode connectivity, points of error", "viridis", "{:+.1f}"),
        ("cka", "CKA of the outputs", "viridis", "{:.2f}"),
    )
    for axis, (name, title, colours, form) in zip(figure.subplots(2, 2).flat, shown, strict=True):
        values = np.log10(found[name].clip(1e-3)) if name == "sharpness" else found[name]
        image = axis.imshow(values.T, origin="lower", aspect="auto", cmap=colours)
        middle = np.nanmean(image.get_clim())
        for (i, j), value in np.ndenumerate(values):
            text = form.format(value) if np.isfinite(value) else "n/a"
            dark = (value < middle) == (colours == "viridis")
            colour = "white" if dark and np.isfinite(value) else "black"
            axis.text(i, j, text, ha="center", va="center", color=colour, fontsize=8)
        axis.set(title=title, xlabel="width (load falls)", ylabel="images in a batch")
        axis.set_xticks(range(len(results["widths"])), results["widths"])
        axis.set_yticks(range(len(results["batch_sizes"])), results["batch_sizes"])
        axis.tick_params(length=0)
        axis.grid(visible=False)
    return figure


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture to `path` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        make_figure(results).savefig(path, dpi=130, metadata={"Software": None})


def make_parser() -> argparse.ArgumentParser:
    """The flags and their defaults."""
    parser = argparse.ArgumentParser(prog="python -m examples.phase_diagram", description=__doc__)
    add = parser.add_argument
    add("--first-seed", type=int, default=0, help="the first of three seeds (0)")
    add("--steps", type=int, default=1500, help="updates of each network (1500)")
    add("--curve-steps", type=int, default=400, help="updates of each curve (400)")
    add("--rate", type=float, default=0.05, help="learning rate, before it is cut (0.05)")
    add("--train-size", type=int, default=500, help="training images (500)")
    add("--out", type=Path, default=Path("out/phase_diagram.png"), help="the picture")
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
