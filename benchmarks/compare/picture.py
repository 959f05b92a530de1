"""The picture: what each method gains, how sharp its solutions are, and the loss around them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compare.report import Arm, Estimate, difference, is_finite
from benchmarks.compare.training import LINE_POSITIONS
from flatopt import plots
from flatopt.plots import COLOURS, STYLE

TITLE = ("dataset", "train_size", "seeds", "steps")
LINES = 4  # More than the first so many methods cannot be told apart.
OTHERS = "0.45"  # The colour of the methods that have no line.
WIDTH, ROW, FRAME = 10.5, 0.34, 2.0  # In inches: of the figure, of a method, of what is around.


def title(dataset: str, train_size: int, seeds: int, steps: int) -> str:
    """What was run, from the settings named in `TITLE`."""
    return f"{dataset}, {train_size} training images, {seeds_in_words(seeds)}, {steps} steps"


def seeds_in_words(number: int) -> str:
    """Such as "1 seed"."""
    return f"{number} seed" if number == 1 else f"{number} seeds"


def draw(arms: Sequence[Arm], heading: str, path: Path) -> None:
    """Writes the picture to `path` as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = make_figure(arms, heading)
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def make_figure(arms: Sequence[Arm], heading: str) -> Figure:
    """Lays out the three panels; a method is a row of the first two."""
    names = list(dict.fromkeys(arm.method for arm in arms))
    colours = {name: COLOURS[i] if i < LINES else OTHERS for i, name in enumerate(names)}
    figure = Figure(figsize=(WIDTH, max(4.6, FRAME + ROW * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    gains, sharpness, lines = figure.subplots(1, 3, width_ratios=(1.0, 1.0, 1.15))
    _draw_gains(gains, arms, names, colours)
    _draw_sharpness(sharpness, arms, names, colours)
    full = [arm for arm in arms if not arm.equal_gradients and is_finite(arm)]
    _draw_lines(lines, full[:LINES], colours)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=13, weight="bold")
    _explain(figure, arms)
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """One height a method, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _height(arm: Arm, names: Sequence[str]) -> float:
    """A shortened run stands a little lower than the full one of its method."""
    return names.index(arm.method) + (0.24 if arm.equal_gradients else 0.0)


def _face(arm: Arm, colour: str) -> str:
    return "white" if arm.equal_gradients else colour


def _draw_gains(
    axes: Axes, arms: Sequence[Arm], names: Sequence[str], colours: dict[str, str]
) -> None:
    baseline = arms[0]
    _rows(axes, names)
    axes.axvline(0, color=colours[baseline.method], linewidth=1)
    for arm in arms:
        height, colour = _height(arm, names), colours[arm.method]
        if not is_finite(arm):
            axes.text(0.0, height, " diverged", va="center", color=colour)
            continue
        gain = difference(arm, baseline)
        axes.errorbar(
            gain.mean,
            height,
            xerr=None if arm is baseline else gain.error,
            fmt="o",
            markersize=7,
            color=colour,
            markerfacecolor=_face(arm, colour),
            markeredgewidth=1.5,
            elinewidth=1.5,
        )
    axes.margins(x=0.08)
    axes.set_title("Accuracy gained")
    level = Estimate.of(100 * baseline.accuracy).mean
    axes.set_xlabel(f"test accuracy minus that of {baseline.method}\n({level:.1f} %), points")


def _draw_sharpness(
    axes: Axes, arms: Sequence[Arm], names: Sequence[str], colours: dict[str, str]
) -> None:
    axes.set_xscale("log")
    _rows(axes, names)
    axes.set_yticklabels([])
    for arm in arms:
        height, colour = _height(arm, names), colours[arm.method]
        seeds = np.asarray(arm.top_eigenvalue)
        shown = seeds[np.isfinite(seeds) & (seeds > 0)]  # What a logarithmic axis can show.
        axes.plot(shown, np.full(len(shown), height), "|", color=colour, markersize=7, alpha=0.45)
        mean = float(np.mean(seeds))
        if np.isfinite(mean) and mean > 0:
            axes.plot(
                mean,
                height,
                "o",
                markersize=7,
                color=colour,
                markerfacecolor=_face(arm, colour),
                markeredgewidth=1.5,
            )
    axes.set_title("Sharpness of the solutions")
    plots.tick_powers(axes.xaxis)
    axes.set_xlabel("largest eigenvalue of the Hessian\nof the training loss (flatter: left)")


def _draw_lines(axes: Axes, arms: Sequence[Arm], colours: dict[str, str]) -> None:
    """The loss at both sides of the solution, their mean; the losses differ by powers of ten."""
    axes.set_yscale("log")
    half = len(LINE_POSITIONS) // 2
    # In the legend as they lie at the solution, the highest first.
    for arm in sorted(arms, key=lambda arm: -np.mean(arm.line, axis=0)[half]):
        line = np.mean(arm.line, axis=0)
        values = (line[half:] + line[half::-1]) / 2
        axes.plot(LINE_POSITIONS[half:], values, color=colours[arm.method], label=arm.method)
    axes.set_xlim(0, 1)
    axes.margins(y=0.08)
    plots.tick_powers(axes.yaxis)
    axes.set_title("Loss around the solutions")
    axes.set_xlabel("distance along random directions,\nin units of the weights")
    axes.set_ylabel("training loss")
    axes.legend(loc="lower right")


def _explain(figure: Figure, arms: Sequence[Arm]) -> None:
    """What the marks mean, below the panels."""
    notes = ["dot: mean over seeds"]
    if Estimate.of(arms[0].accuracy).error is not None:
        notes.append("bar: standard error of the paired difference; strokes: the seeds")
    if any(arm.equal_gradients for arm in arms):
        notes.append(f"open: shortened to as many gradients as {arms[0].method}")
    figure.supxlabel("; ".join(notes), x=0.01, ha="left", fontsize=10, color="0.35")
