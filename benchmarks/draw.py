"""Draws the plots of the benchmarks from the committed results.

`python -m benchmarks.draw` writes into `benchmarks/plots`; a plot whose results are not there yet
is left out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from benchmarks.record import RESULTS

PLOTS = Path(__file__).parent / "plots"
COLUMNS = 3


def scaling(results: dict[str, Any]) -> Figure:
    """One panel a part, both axes logarithmic: milliseconds of a step."""
    parts = results["parts"]
    rows = -(-len(parts) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(4 * COLUMNS, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis, (part, points) in zip(axes.flat, parts.items(), strict=False):
        for name in {name: None for rows_of in points.values() for name in rows_of}:
            numbers = [int(n) for n in points]
            values = [points[n][name]["milliseconds"] for n in points]
            (line,) = axis.plot(numbers, [v["median"] for v in values], "o-", label=name)
            low, high = [v["min"] for v in values], [v["max"] for v in values]
            axis.fill_between(numbers, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=part.replace("_", " "), ylabel="ms a step")
        if numbers[-1] <= 100 * numbers[0]:  # Too short for powers of ten.
            axis.set_xticks(numbers, [str(n) for n in numbers])
        for one in (axis.xaxis, axis.yaxis):
            one.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.legend(fontsize="small")
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    return figure


def step_time(results: dict[str, Any]) -> Figure:
    """Each step over its own base: median and range; the number of gradients beside it."""
    found = results["models"]
    most = max(len(result["rows"]) for result in found.values())
    figure, axes = plt.subplots(
        1, len(found), figsize=(7 * len(found), 1 + 0.25 * most), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (model, result) in zip(axes.flat, found.items(), strict=True):
        for height, row in enumerate(reversed(result["rows"])):
            r = row["over_base"]
            colour = "C0" if row["library"] == "flatopt" else "C1"
            axis.plot([r["min"], r["max"]], [height, height], color=colour)
            axis.plot(r["median"], height, "o", color=colour)
            axis.plot(row["gradients_per_step"], height, "|", color="black", markersize=9)
        axis.set_yticks(range(len(result["rows"])), [r["variant"] for r in result["rows"]][::-1])
        axis.set(xscale="log", xlabel="over its base optimiser; bar: gradients", title=model)
        axis.set_ylim(-1, len(result["rows"]))
        axis.grid(axis="x", which="both", alpha=0.3)
    return figure


def whole_run(results: dict[str, Any]) -> Figure:
    """Seconds of a whole run, per seed, of each method."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    rows = results["rows"]
    kinds = [*rows[0]["compile_seconds"], "peer"]
    for i, kind in enumerate(kinds):
        own = [(n, row) for n, row in enumerate(rows) if kind in row["seconds_per_seed"]]
        label = "PyTorch loop" if kind == "peer" else f"flatopt, seeds: {kind}"
        places = [n + (i - (len(kinds) - 1) / 2) / (len(kinds) + 1) for n, _ in own]
        heights = [row["seconds_per_seed"][kind]["median"] for _, row in own]
        if own:
            axis.bar(places, heights, 1 / (len(kinds) + 1), label=label)
    axis.set_xticks(range(len(rows)), [row["method"] for row in rows], rotation=30)
    axis.set(yscale="log", ylabel=f"s a seed, {results['steps']} steps")
    axis.legend()
    return figure


KINDS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "scaling": scaling,
    "step_time": step_time,
    "whole_run": whole_run,
}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draws every results file of a folder that has a plot; returns what it wrote."""
    written = []
    for path in sorted(results.glob("*.json")):
        kind = next((kind for kind in KINDS if path.stem.startswith(kind)), None)
        if kind is not None:
            figure = KINDS[kind](json.loads(path.read_text()))
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{path.stem}.png")
            figure.savefig(written[-1], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return written


def main() -> None:
    """Draws what is committed."""
    plt.switch_backend("agg")
    for path in draw(RESULTS, PLOTS):
        print(f"drew {path.name}")


if __name__ == "__main__":
    main()
