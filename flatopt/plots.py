"""Pictures of what the measures, curves and landscapes compute. Needs the extra `plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, for colour-blind readers too; wine red in place of pale yellow.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
STYLES = ("-", "--", ":", "-.")
_LOOK: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
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


def contours(
    xs: Any,
    ys: Any,
    losses: Any,
    axes: Axes | None = None,
    *,
    levels: int = 20,
    highest: float | None = None,
    trajectory: Any = None,
    points: Mapping[str, Sequence[float]] | None = None,
) -> Axes:
    """Draws a landscape as filled contours, with a trajectory and marked points.

    Args:
      xs: [n] coordinates.
      ys: [m] coordinates.
      losses: [m, n], from `flatopt.landscape.plane`. What is not finite is left white.
      axes: where to draw; None: a new figure, `axes.figure`.
      levels: number of contours, equally spaced in the logarithm of the loss.
      highest: losses above are drawn as this; None: the 95th percentile.
      trajectory: [steps, 2] coordinates, from `flatopt.landscape.project`, or None.
      points: coordinates of points to mark, by name.

    Returns:
      The axes.
    """
    axes = _axes(axes)
    values = np.ma.masked_invalid(np.asarray(losses, float))
    finite = values.compressed()
    if finite.size:
        low = max(finite.min(), 1e-12)
        top = max(np.percentile(finite, 95) if highest is None else highest, 1.001 * low)
        steps = np.geomspace(low, top, levels)
        drawn = axes.contourf(
            np.asarray(xs), np.asarray(ys), np.clip(values, low, top), steps,
            norm=matplotlib.colors.LogNorm(low, top), cmap="viridis", extend="neither",
        )  # fmt: skip
        bar = axes.figure.colorbar(drawn, ax=axes, label="loss")
        bar.ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
        bar.ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    if trajectory is not None:
        path = np.asarray(trajectory)
        axes.plot(path[:, 0], path[:, 1], color="white", linewidth=2.4)
        axes.plot(path[:, 0], path[:, 1], color="black", linewidth=1, marker=".", markersize=3)
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


def profile(results: Any, axes: Axes | None = None, *, ylabel: str = "loss") -> Axes:
    """Draws losses along lines or curves, such as barriers.

    Args:
      results: a `flatopt.measures.Barrier` or a pair of positions and losses, or a dict of them by
        name.
      axes: where to draw; None: a new figure, `axes.figure`.
      ylabel: what is drawn.

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
) -> Axes:
    """Draws accuracy against a measure of flatness, one colour a method, one point a run.

    Args:
      flatness: a number or a list of numbers for each method.
      accuracy: as many for each method.
      axes: where to draw; None: a new figure, `axes.figure`.
      xlabel: name of the measure.
      ylabel: name of the accuracy.
      log: whether the measure's axis is logarithmic; values <= 0 are then not shown.

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
        axes.plot(x[keep], y[keep], linestyle="", marker="o", color=_colour(number)[0], label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _legend(axes)
    return axes


def _axes(axes: Axes | None) -> Axes:
    """The axes to draw on; a new figure does not need a screen, nor a call to close it."""
    if axes is not None:
        return axes
    with matplotlib.rc_context(_LOOK):
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
