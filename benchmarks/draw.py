"""Draws the plots of the benchmarks and of the documentation from the committed results.

`python -m benchmarks.draw`; a plot whose results are not there yet is left out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.compare import picture, report
from benchmarks.record import RESULTS
from examples import binary_perceptron, perceptron, phase_diagram, three_regimes
from flatopt.plots import COLOURS, STYLE, tick_powers

PLOTS = Path(__file__).parent / "plots"
DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = 3
WIDTH = 10.0  # In inches: a page shows it at 80 dots an inch or so.
MARKERS = ("", "o", "s", "D", "^")
TITLES = {"mlp": "an MLP", "cnn": "a CNN", "transformer": "a Transformer"}
LIBRARIES = {
    "flatopt": COLOURS[1],
    "by hand": COLOURS[3],
    "optax": COLOURS[5],
    "PyTorch": COLOURS[2],
}


def scaling(results: dict[str, Any]) -> Figure:
    """One panel a part, both axes logarithmic: milliseconds of a step."""
    parts = results["parts"]
    rows = -(-len(parts) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(WIDTH, 3 * rows + 0.4), squeeze=False, layout="constrained"
    )
    names = dict.fromkeys(
        name for points in parts.values() for row in points.values() for name in row
    )
    colours = dict(zip(names, COLOURS, strict=False))
    for axis, (part, points) in zip(axes.flat, parts.items(), strict=False):
        for name in dict.fromkeys(name for row in points.values() for name in row):
            numbers = [int(n) for n in points]
            values = [points[n][name]["milliseconds"] for n in points]
            colour = colours[name]
            axis.plot(numbers, [v["median"] for v in values], "o-", color=colour, label=name)
            low, high = [v["min"] for v in values], [v["max"] for v in values]
            axis.fill_between(numbers, low, high, alpha=0.2, color=colour, linewidth=0)
        what = part.replace("_", " ")
        axis.set(xscale="log", yscale="log", xlabel=what, title=f"Over the {what}")
        tick_powers(axis.yaxis)
        tick_powers(axis.xaxis)
        if numbers[-1] <= 100 * numbers[0]:  # Too short for powers of ten.
            axis.set_xticks(numbers, [str(n) for n in numbers])
            axis.set_xticks([], minor=True)
        axis.legend(fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms a step")
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    figure.suptitle("Time of a step: median and range", x=0.01, ha="left", weight="bold")
    return figure


def step_time(results: dict[str, Any]) -> Figure:
    """Each step over its own base: median and range; the number of gradients beside it."""
    found = results["models"]
    heights = [len(result["rows"]) for result in found.values()]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(WIDTH, sum(1.6 + 0.25 * n for n in heights)), squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axis, (model, result) in zip(axes.flat, found.items(), strict=True):
        _draw_steps(axis, result["rows"])
        axis.set_title(f"Time of a step on {TITLES.get(model, model)}, over its base optimiser's")
    figure.legend(handles=_explain_steps(found), ncols=5, loc="outside lower center")
    return figure


def _explain_steps(models: dict[str, Any]) -> list[Line2D]:
    """What the colours and the strokes mean."""
    there = {row["library"].split(".")[0] for result in models.values() for row in result["rows"]}
    dots = [
        Line2D([], [], color=colour, marker="o", markersize=6, label=library)
        for library, colour in LIBRARIES.items()
        if library in there
    ]
    stroke = Line2D([], [], color="0.25", marker="|", markersize=11, linestyle="")
    stroke.set_label("gradients a step")
    return [*dots, stroke]


def _draw_steps(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """One line a variant, coloured by its library."""
    for height, row in enumerate(rows):
        library = row["library"].split(".")[0]
        colour = LIBRARIES[library]
        ratio = row["over_base"]
        axis.plot([ratio["min"], ratio["max"]], [height, height], color=colour)
        axis.plot(ratio["median"], height, "o", color=colour, markersize=6)
        axis.plot(row["gradients_per_step"], height, "|", color="0.25", markersize=11)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.set(xscale="log", xlabel="times the base optimiser's step: median and range")
    tick_powers(axis.xaxis)
    axis.grid(axis="x", which="both")


def whole_run(results: dict[str, Any]) -> Figure:
    """Seconds of a whole run, per seed, of each method."""
    rows = results["rows"]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.36 * len(rows)), layout="constrained")
    looks = {
        "1": ("one compiled run", COLOURS[1], "o"),
        "8": ("eight seeds in one compiled run", COLOURS[3], "s"),
        "peer": ("PyTorch loop", COLOURS[2], "D"),
    }
    for kind, (label, colour, marker) in looks.items():
        own = [(n, row["seconds_per_seed"][kind]) for n, row in enumerate(rows)
               if kind in row["seconds_per_seed"]]  # fmt: skip
        for height, seconds in own:
            axis.plot([seconds["min"], seconds["max"]], [height, height], color=colour)
        medians, heights = [seconds["median"] for _, seconds in own], [n for n, _ in own]
        if own:
            axis.plot(medians, heights, marker, color=colour, linestyle="", label=label)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set(xscale="log", xlabel=f"seconds a seed for {results['steps']} steps")
    tick_powers(axis.xaxis)
    axis.set_title("A whole run without its compilation: median and range")
    figure.legend(ncols=3, loc="outside lower center")
    return figure


def sparse(results: dict[str, Any]) -> Figure:
    """Test accuracy and the top eigenvalue over the share of weights that are off."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
    looks = dict(zip(dict.fromkeys(a["method"] for a in results["arms"]), MARKERS, strict=True))
    for number, (method, marker) in enumerate(looks.items()):
        found = [arm for arm in results["arms"] if arm["method"] == method]
        for axis, field, unit in ((axes[0], "accuracy", 100), (axes[1], "top_eigenvalue", 1)):
            values = [report.Estimate.of(unit * np.array(arm[field])) for arm in found]
            means, errors = [v.mean for v in values], [v.error or 0 for v in values]
            if len(found) == 1:  # The whole network is off nowhere.
                axis.axhline(means[0], color=COLOURS[number], linestyle="--", label=method)
                continue
            off = [f"{100 * arm['sparsity']:g}" for arm in found]
            axis.errorbar(off, means, errors, color=COLOURS[number], marker=marker, label=method)
    axes[0].set(title="Test accuracy", xlabel="weights that are off, %", ylabel="%")
    axes[1].set(title="Sharpness: top eigenvalue", xlabel="weights that are off, %", yscale="log")
    tick_powers(axes[1].yaxis)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(names), loc="outside lower center")
    return figure


def batch_hessian(results: dict[str, Any]) -> Figure:
    """The top eigenvalue of a batch's Hessian over that of all images, over the batch's size."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    whole = np.array(results["whole"])
    sizes = [int(size) for size in results["batch"]]
    ratios = np.stack([np.mean(x, -1) / whole for x in results["batch"].values()])
    for number, moment in enumerate(results["settings"]["moments"]):
        values = [report.Estimate.of(row) for row in ratios[:, :, number]]
        means, errors = [v.mean for v in values], [v.error or 0 for v in values]
        colour, marker, label = COLOURS[number + 1], MARKERS[number + 1], f"after {moment} steps"
        axis.errorbar(sizes, means, errors, color=colour, marker=marker, label=label)
    axis.axhline(1.0, color="0.5", linestyle="--")
    axis.set(title="Top eigenvalue of a batch's Hessian", xlabel="images in the batch")
    axis.set(ylabel="over that of all images", xscale="log", xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.legend()
    return figure


KINDS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "batch_hessian": batch_hessian,
    "scaling": scaling,
    "sparse": sparse,
    "step_time": step_time,
    "whole_run": whole_run,
}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draws every results file of a folder that has a plot; returns what it wrote."""
    written = []
    for path in sorted(results.glob("*.json")):
        kind = next((kind for kind in KINDS if path.stem.startswith(kind)), None)
        if kind is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{path.stem}.png")
            with plt.rc_context(STYLE):
                figure = KINDS[kind](json.loads(path.read_text()))
                figure.savefig(written[-1], dpi=130, metadata={"Software": None})
            plt.close(figure)
    return written


def draw_comparison(results: Path, path: Path) -> None:
    """Draws the picture of the comparison on digits."""
    found = json.loads(results.read_text())
    title = picture.title(**{name: found["settings"][name] for name in picture.TITLE})
    picture.draw(report.from_json(found["arms"]), title, path)


def draw_perceptron(results: Path, path: Path) -> None:
    """Draws what `examples.perceptron` found."""
    perceptron.draw(json.loads(results.read_text())["arms"], path)


def main() -> None:
    """Draws what is committed."""
    plt.switch_backend("agg")
    for path in draw(RESULTS, PLOTS):
        print(f"drew {path.name}")
    draw_comparison(RESULTS / "compare_digits.json", DOCS / "compare.png")
    draw_perceptron(RESULTS / "perceptron.json", DOCS / "perceptron.png")
    binary = json.loads((RESULTS / "binary_perceptron.json").read_text())
    binary_perceptron.draw(binary["arms"], DOCS / "binary_perceptron.png")
    regimes = json.loads((RESULTS / "three_regimes.json").read_text())
    three_regimes.draw(regimes, DOCS / "three_regimes.png")
    phases = json.loads((RESULTS / "phase_diagram.json").read_text())
    phase_diagram.draw(phases, DOCS / "phase_diagram.png")
    names = "perceptron, binary_perceptron, phase_diagram"
    print(f"drew compare.png, and the pictures of {names} and three_regimes")


if __name__ == "__main__":
    main()
