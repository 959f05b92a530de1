"""The picture: accuracy against flatness, and the loss around each solution."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from benchmarks.compare.report import Arm, Estimate
from benchmarks.compare.training import LINE_POSITIONS
from flatopt.plots import COLOURS

# Shapes and dashes too, so that points and lines that coincide can be told apart.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
LINE_WIDTHS = (3.6, 1.4)  # From the first line to the last: a thin one does not hide a wide one.
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.titlelocation": "left",
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "font.size": 11,
    "legend.frameon": False,
}


def draw(arms: Sequence[Arm], title: str, path: Path) -> None:
    """Writes the picture to `path` as PNG."""
    with matplotlib.rc_context(STYLE):
        make_figure(arms, title).savefig(path, dpi=150, format="png")


def make_figure(arms: Sequence[Arm], title: str) -> Figure:
    """Lays out both halves of the picture."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    looks = _looks(arms)
    _draw_points(left, arms, looks)
    _draw_lines(right, [arm for arm in arms if not arm.equal_gradients], looks)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.draw_without_rendering()  # Fixes the layout, which the labels depend on.
    figure.set_layout_engine("none")
    _label_points(left, arms, looks)
    return figure


class _Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line_style: Any


def _looks(arms: Sequence[Arm]) -> dict[str, _Look]:
    """Eight colours and five line styles: 40 methods before two lines look the same."""
    names = dict.fromkeys(arm.method for arm in arms)
    return {
        name: _Look(
            COLOURS[i % len(COLOURS)],
            MARKERS[i % len(MARKERS)],
            LINE_STYLES[i % len(LINE_STYLES)],
        )
        for i, name in enumerate(names)
    }


def _point(arm: Arm) -> tuple[float, float]:
    return float(np.mean(arm.top_eigenvalue)), 100 * float(np.mean(arm.accuracy))


def _shown(arms: Sequence[Arm]) -> list[Arm]:
    """What a logarithmic axis can show: diverged runs are left out."""
    return [arm for arm in arms if np.isfinite(_point(arm)[0]) and _point(arm)[0] > 0]


def _draw_points(axes: Axes, arms: Sequence[Arm], looks: dict[str, _Look]) -> None:
    axes.set_xscale("log")
    axes.set_title("Test accuracy and flatness", fontsize=11)
    axes.set_xlabel("largest Hessian eigenvalue of the training loss (flatter to the left)")
    axes.set_ylabel("test accuracy, %")
    for arm in _shown(arms):
        x, y = _point(arm)
        look = looks[arm.method]
        axes.errorbar(
            x,
            y,
            xerr=Estimate.of(arm.top_eigenvalue).error,
            yerr=Estimate.of(100 * arm.accuracy).error,
            fmt=look.marker,
            markersize=8,
            color=look.colour,
            markerfacecolor="white" if arm.equal_gradients else look.colour,
            markeredgewidth=1.6,
            elinewidth=1,
            capsize=0,
        )
    axes.margins(0.14)
    notes = []
    if any(Estimate.of(arm.accuracy).error is not None for arm in arms):
        notes.append("bars: one standard error over seeds (the table's differences are paired)")
    if any(arm.equal_gradients for arm in arms):
        notes.append("open, *: shortened to the gradient evaluations of sgd")
    axes.text(
        0.0, -0.17, "\n".join(notes), transform=axes.transAxes, fontsize=9, color="0.4", va="top"
    )


def _draw_lines(axes: Axes, arms: Sequence[Arm], looks: dict[str, _Look]) -> None:
    axes.set_title("Loss around the solution", fontsize=11)
    axes.set_xlabel("position along random filter-normalised directions")
    axes.set_ylabel("training loss")
    widths = np.linspace(*LINE_WIDTHS, len(arms))
    for arm, width in zip(arms, widths, strict=True):
        look = looks[arm.method]
        axes.plot(
            LINE_POSITIONS,
            np.mean(arm.line, axis=0),
            linestyle=look.line_style,
            color=look.colour,
            linewidth=width,
            label=arm.label,
        )
    axes.set_xlim(-1, 1)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center")


def _label_points(axes: Axes, arms: Sequence[Arm], looks: dict[str, _Look]) -> None:
    """Puts each label on the nearest free place around its point, with a line if it is far."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    shown = _shown(arms)
    frame = axes.get_window_extent(renderer)
    taken = [box for arm in shown for box in _obstacles(axes, arm, renderer.points_to_pixels(1.0))]
    line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.8, "shrinkB": 5}
    for arm in shown:

        def place(offset: tuple[float, float], arm: Arm = arm) -> Annotation:
            return axes.annotate(
                arm.label,
                _point(arm),
                offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=10,
                color=looks[arm.method].colour,
                arrowprops=line if math.hypot(*offset) > 30 else None,
            )

        def words(label: Annotation) -> Bbox:
            label.update_positions(renderer)
            # The method of the parent class: an annotation's own extent includes its line.
            return Text.get_window_extent(label, renderer)

        def is_free(box: Bbox) -> bool:
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
            return inside and not any(box.overlaps(other) for other in taken)

        places = _offsets()
        for offset in places:
            label = place(offset)
            box = words(label)
            if is_free(box):
                break
            label.remove()
        else:  # Nowhere is free: better an overlap than no label.
            box = words(place(places[0]))
        taken.append(box)


def _obstacles(axes: Axes, arm: Arm, scale: float) -> list[Bbox]:
    """The marker of an arm and its error bars, in pixels; `scale` is a point in pixels."""
    (x, y), pad = _point(arm), 4 * scale
    errors = Estimate.of(arm.top_eigenvalue).error, Estimate.of(100 * arm.accuracy).error
    half = [error or 0.0 for error in errors]
    # A bar that reaches below zero is cut: the axis is logarithmic.
    ends = [
        [(max(x - half[0], x / 100), y), (x + half[0], y)],
        [(x, y - half[1]), (x, y + half[1])],
    ]
    boxes = [Bbox(axes.transData.transform(pair)) for pair in ends]
    return [box.padded(pad) for box in boxes]


def _offsets() -> list[tuple[float, float]]:
    """Places for a label around its point, in points, the nearest first."""
    return [
        (1.4 * radius * math.cos(angle), radius * math.sin(angle))
        for radius in range(14, 100, 6)
        for angle in np.linspace(0, 2 * math.pi, 16, endpoint=False)
    ]
