"""The second picture: spectral densities, and the loss in the plane through three solutions."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compare.flatness import Surface
from benchmarks.compare.picture import STYLE
from flatopt import measures, plots


def draw(
    densities: Mapping[str, measures.SpectralDensity],
    surface: Surface | None,
    title: str,
    path: Path,
) -> None:
    """Writes the picture to `path` as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2) if surface else (6.5, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2 if surface else 1, squeeze=False)[0]
        plots.density(densities, panels[0])
        panels[0].set_title("Density of the Hessian's eigenvalues", fontsize=11)
        if surface is not None:
            plots.contours(
                surface.xs, surface.ys, surface.losses, panels[1], points=surface.corners
            )
            panels[1].set_title("Training loss in the plane through three solutions", fontsize=11)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=150, format="png")
