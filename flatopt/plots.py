"""Pictures of what the measures, curves and landscapes compute. Needs the extra `plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('flatopt.plots needs "flatopt[plots]".', name=error.name) from error

import matplotlib.colors
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, for colour-blind readers too; wine red in place of pale yellow.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
STYLES = ("-", "--", ":", "-.")
# What every picture of the project looks like, for `matplotlib.rc_context`.
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 11,
    "lines.linewidth": 2,
    "grid.color": "0.92",
    "legend.frameon": False,
}


def density(results: Any, axes: Axes | None = None, *, floor: float = 1e-4) -> Axes:
    """Draws spectral densities on a logarithmic scale.

    Args:
      results: a `flatopt.measures.SpectralDensity`, or a dict of them by name.
      axes: where to draw; None: a new figure, `axes.figure`.
      floor: densities below are not shown, > 0.

    Returns:
      The axes.
    """
    axes = _axes(axes)
    for number, (name, result) in enumerate(_named(results).items()):
        colour, style = _colour(number)
        grid, values = np.asarray(result.grid), np.asarray(result.density)
        error = np.nan_to_num(np.asarray(result.standard_error))
        axes.plot(grid, np.maximum(values, floor), color=colour, linestyle=style, label=name)
        axes.fill_between(
            grid,
            np.maximum(values - error, floor),
            np.maximum(values + error, floor),
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    _legend(axes)
    return axes


def spectrum(
    results: Any,
    axes: Axes | None = None,
    *,
    num_params: int | None = None,
    decades: float = 4.0,
) -> Axes:
    """Draws how many eigenvalues exceed each size, both axes logarithmic.

    The bulk and the few eigenvalues far from it are seen at once, and nothing is smoothed.

    Args:
      results: a `flatopt.measures.SpectralDensity`, or a dict of them by name.
      axes: where to draw; None: a new figure, `axes.figure`.
      num_params: number of eigenvalues; None: shares of them are drawn.
      decades: what is shown below the largest eigenvalue of all, in powers of ten, > 0.

    Returns:
      The axes.
    """
    axes = _axes(axes)
    named = _named(results)
    number = 1 if num_params is None else num_params
    highest = max((float(np.max(result.nodes)) for result in named.values()), default=1.0)
    highest = highest if np.isfinite(highest) and highest > 0 else 1.0
    sizes = np.geomspace(highest * 10.0**-decades, 1.2 * highest, 800)
    for i, (name, result) in enumerate(named.items()):
        colour, style = _colour(i)
        above = np.asarray(result.nodes)[None] > sizes[:, None, None]
        shares = np.sum(np.asarray(result.weights)[None] * above, axis=-1)  # [sizes, probes]
        axes.plot(sizes, number * shares.mean(axis=1), color=colour, linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    if num_params is not None:
        axes.set_ylim(0.5)  # Half an eigenvalue: there is no less.
    axes.set_xlabel("size")
    axes.set_ylabel("share of eigenvalues above" if num_params is None else "eigenvalues above")
    _legend(axes)
    return axes


def contours(
    xs: Any,
    ys: Any,
    losses: Any,
    axes: Axes | None = None,
    *,
    levels: int = 20,
    lowest: float | None = None,
    highest: float | None = None,
    trajectory: Any = None,
    points: Mapping[str, Sequence[float]] | None = None,
    label: str = "loss",
) -> Axes:
    """Draws a landscape as filled contours, with a trajectory and marked points.

    Args:
      xs: [n] coordinates.
      ys: [m] coordinates.
      losses: [m, n], from `flatopt.landscape.plane`. What is not finite is left white.
      axes: where to draw; None: a new figure, `axes.figure`.
      levels: number of contours, equally spaced in the logarithm of the loss.
      lowest: losses below are drawn as this, > 0; None: the least loss.
      highest: losses above are drawn as this; None: the 95th percentile.
      trajectory: [steps, 2] coordinates, from `flatopt.landscape.project`, or None.
      points: coordinates of points to mark, by name.
      label: what the colours show.

    Returns:
      The axes.
    """
    axes = _axes(axes)
    values = np.ma.masked_invalid(np.asarray(losses, float))
    finite = values.compressed()
    if finite.size:
        low = max(finite.min() if lowest is None else lowest, 1e-12)
        top = max(np.percentile(finite, 95) if highest is None else highest, 1.001 * low)
        steps = np.geomspace(low, top, levels)
        drawn = axes.contourf(
            np.asarray(xs), np.asarray(ys), np.clip(values, low, top), steps,
            norm=matplotlib.colors.LogNorm(low, top), cmap="viridis", extend="neither",
        )  # fmt: skip
        bar = axes.figure.colorbar(drawn, ax=axes, label=label)
        tick_powers(bar.ax.yaxis)
    if trajectory is not None:
        path = np.asarray(trajectory)
        axes.plot(path[:, 0], path[:, 1], color="white", linewidth=2.4)
        axes.plot(path[:, 0], path[:, 1], color="black", linewidth=1, marker=".", markersize=2)
    for name, place in (points or {}).items():
        axes.plot(*place, marker="o", color="white", markeredgecolor="black")
        axes.annotate(
            name, (place[0], place[1]), (5, 5), textcoords="offset points",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )  # fmt: skip
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.grid(False)
    return axes


def profile(
    results: Any, axes: Axes | None = None, *, ylabel: str = "loss", log: bool = False
) -> Axes:
    """Draws losses along lines or curves, such as barriers.

    Args:
      results: a `flatopt.measures.Barrier` or a pair of positions and losses, or a dict of them by
        name.
      axes: where to draw; None: a new figure, `axes.figure`.
      ylabel: what is drawn.
      log: whether its axis is logarithmic.

    Returns:
      The axes.
    """
    axes = _axes(axes)
    for number, (name, result) in enumerate(_named(results).items()):
        colour, style = _colour(number)
        # A Barrier is (height, positions, losses), a curve's profile (positions, losses).
        positions, losses = result[-2:]
        axes.plot(
            np.asarray(positions), np.asarray(losses), color=colour, linestyle=style, label=name
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("position")
    axes.set_ylabel(ylabel)
    _legend(axes)
    return axes


def scatter(
    flatness: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    axes: Axes | None = None,
    *,
    xlabel: str = "largest eigenvalue",
    ylabel: str = "test accuracy",
    log: bool = True,
    lowest: float | None = None,
) -> Axes:
    """Draws accuracy against a measure of flatness, one colour a method, one point a run.

    Args:
      flatness: a number or a list of numbers for each method.
      accuracy: as many for each method.
      axes: where to draw; None: a new figure, `axes.figure`.
      xlabel: name of the measure.
      ylabel: name of the accuracy.
      log: whether the measure's axis is logarithmic; values <= 0 are then not shown.
      lowest: what is less accurate stands at the lower edge with its accuracy beside it, and does
        not press the others together; None: the axis reaches to it.

    Returns:
      The axes.

    Raises:
      ValueError: if a method has no accuracy or another number of them.
    """
    axes = _axes(axes)
    if log:
        axes.set_xscale("log")
    for number, (name, values) in enumerate(flatness.items()):
        if name not in accuracy or np.size(values) != np.size(accuracy[name]):
            raise ValueError(f"{name!r} needs as many accuracies as values of flatness.")
        x, y = np.atleast_1d(values), np.atleast_1d(accuracy[name])
        keep = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log))
        x, y, colour = x[keep], y[keep], _colour(number)[0]
        axes.plot(x, y, linestyle="", marker="o", color=colour, label=name)
        if lowest is not None:
            for place, value in zip(x[y < lowest], y[y < lowest], strict=True):
                axes.plot(place, lowest, "v", color=colour, clip_on=False, zorder=3)
                axes.annotate(
                    f"{value:.4g}", (place, lowest), (0, 9), textcoords="offset points",
                    ha="center", color=colour,
                )  # fmt: skip
    if lowest is not None:
        axes.autoscale_view()
        axes.set_ylim(bottom=lowest)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _legend(axes)
    return axes


def tick_powers(axis: Axis) -> None:
    """Labels a logarithmic axis: powers of ten, or 1, 2 and 5 times them where there are few.

    Args:
      axis: such as `axes.xaxis`, with its limits as they will be.

    Returns:
      None.
    """
    low, high = axis.get_view_interval()
    short = high < 100 * low
    marks = (1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=marks if short else (1.0,), numticks=12))
    axis.set_minor_formatter(NullFormatter())
    if short:
        axis.set_major_formatter(FormatStrFormatter("%g"))


def _axes(axes: Axes | None) -> Axes:
    """The axes to draw on; a new figure does not need a screen, nor a call to close it."""
    if axes is not None:
        return axes
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        return figure.subplots()


def _named(results: Any) -> dict[str, Any]:
    return dict(results) if isinstance(results, Mapping) else {"": results}


def _colour(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    named = [(h, label) for h, label in zip(handles, labels, strict=True) if label]
    if named:
        axes.legend(*zip(*named, strict=True))
