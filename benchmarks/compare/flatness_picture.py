"""The second picture: the Hessian's spectra, and the loss in the plane through three solutions."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compare.flatness import Surface
from flatopt import measures, plots
from flatopt.plots import STYLE


def draw(
    densities: Mapping[str, measures.SpectralDensity],
    surface: Surface | None,
    num_params: int,
    title: str,
    path: Path,
) -> None:
    """Writes the picture to `path` as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.6) if surface else (6.5, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2 if surface else 1, squeeze=False)[0]
        plots.spectrum(densities, panels[0], num_params=num_params)
        panels[0].set_title(f"Hessian eigenvalues above a size, of {num_params}")
        panels[0].set_xlabel("size of the eigenvalue")
        if surface is not None:
            # A loss that rounds to zero somewhere would take most of the colours.
            lowest = float(np.nanpercentile(surface.losses, 5))
            plots.contours(
                surface.xs,
                surface.ys,
                surface.losses,
                panels[1],
                lowest=lowest,
                points=surface.corners,
                label="training loss",
            )
            panels[1].set_title("Training loss in the plane of three solutions")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
