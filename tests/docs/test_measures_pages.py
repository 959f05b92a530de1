"""The pages of the measures name them all, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import flatopt
from flatopt import curves, landscape, measures, plots

ROOT = Path(__file__).parents[2]
PAGE = "\n".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("measures", "curves"))
RESULTS = ROOT / "benchmarks" / "results"


def _results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def _row(start):
    """The cells of the row of a table that begins with `start`."""
    (row,) = re.findall(rf"^\| {re.escape(start)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize(
    "name",
    [n for n in vars(measures) if n.islower() and not n.startswith("_")]
    + [n for n in vars(flatopt) if n.startswith("record_")],
)
def test_every_measure_is_on_the_page(name):
    helpers = {"quantise", "geodesic", "chain_units"}  # Parts of measures that are there.
    assert name in helpers or f"`{name}" in PAGE or f"={name}(" in PAGE or f".{name}(" in PAGE


def test_correlations_are_the_measured_ones():
    results = _results("sharpness_correlation")
    assert f"over {results['runs_fitted']} networks" in PAGE
    groups = [group for group in results["correlations"] if results["correlations"][group]]
    for measure, entry in results["correlations"]["all"].items():
        own = [f"{results['correlations'][g][measure]['spearman']:+.2f}" for g in groups]
        low, high = entry["interval_95"]
        assert _row(measure) == [f"{own[0]} [{low:+.2f}, {high:+.2f}]", *own[1:]]


def test_peers_agree_and_times_are_the_measured_ones():
    results = _results("hessian_peers")
    assert results["all_within_tolerance"]
    assert not results["peer_errors"]
    for row in results["rows"]:
        (name,) = re.findall(rf"^\| ({row['library']} \S+) \|", PAGE, re.MULTILINE)
        error, seconds, ratio = _row(name)
        assert float(error) == pytest.approx(row["largest_relative_error"], rel=0.05)
        assert seconds.startswith(f"{row['seconds_median']:.3f} ")
        assert ratio.startswith(f"{row['ratio_flatopt_to_it_median']:.3f} ")


def test_scale_is_the_measured_one():
    results = _results("hessian_scale")
    assert results["seconds_with_compilation"] < 180
    assert all(results["converged"])
    assert len(set(results["temporary_bytes"].values())) == 1
    seconds = f"{results['seconds_with_compilation']:.0f} s with compilation"
    assert f"{results['products']} products and {seconds}" in PAGE


def test_barriers_are_the_measured_ones():
    pairs = _results("connectivity")["pairs"]
    means = {}
    for way in pairs[0]["loss_barrier"]:
        means[way] = np.mean([pair["loss_barrier"][way] for pair in pairs])
        error = 100 * np.mean([pair["error_barrier"][way] for pair in pairs])
        assert _row(way) == [f"{means[way]:.4f}", f"{error:.2f}"]
    assert means["linear, aligned"] < 0.2 * means["linear"]
    assert means["Bezier"] < 0.05 * means["linear"]


def test_modules_that_the_page_names_are_there():
    for module in (measures, curves, landscape, plots):
        assert f"`{module.__name__}`" in PAGE
