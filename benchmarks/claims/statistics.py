"""Differences of arms that ran with the same seeds, and what may be said of many of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

Outcome = Literal["won", "tied", "lost"]


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
      mean: over seeds.
      error: standard error of the mean, from the spread over seeds.
      p: two-sided, of Student's t: how likely so large a mean is where there is no difference.
      seeds: how many.
    """

    mean: float
    error: float
    p: float
    seeds: int

    @property
    def outcome(self) -> Outcome:
        """Tied within one standard error, else won or lost."""
        if abs(self.mean) <= self.error:
            return "tied"
        return "won" if self.mean > 0 else "lost"


def paired(values: Sequence[float], base: Sequence[float]) -> Difference:
    """`values` minus `base`, seed by seed.

    Raises:
      ValueError: if the seeds are not the same number, or fewer than two, or a value is not finite.
    """
    found, other = np.asarray(values, float), np.asarray(base, float)
    if found.shape != other.shape or found.ndim != 1 or len(found) < 2:
        raise ValueError(
            f"values {found.shape} and base {other.shape} must have the same seeds, at least two"
        )
    differences = found - other
    if not np.isfinite(differences).all():
        raise ValueError("values and base must be finite: leave out arms that diverged, and say so")
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    if error == 0.0:
        return Difference(mean, error, 1.0 if mean == 0.0 else 0.0, len(differences))
    p = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))
    return Difference(mean, error, p, len(differences))


def count(differences: Sequence[Difference]) -> dict[Outcome, int]:
    """How many were won, tied and lost."""
    outcomes = [difference.outcome for difference in differences]
    return {name: outcomes.count(name) for name in ("won", "tied", "lost")}


def holm(p: Mapping[str, float], level: float = 0.05) -> set[str]:
    """The comparisons that stand when all are made together, after Holm (1979).

    The smallest `p` must be at most `level / m`, the next `level / (m - 1)`, and so on up to the
    first that fails: the chance that one or more stands wrongly is at most `level`, however the
    comparisons depend on each other.
    """
    stand = set()
    for number, name in enumerate(sorted(p, key=lambda name: p[name])):
        if p[name] > level / (len(p) - number):
            break
        stand.add(name)
    return stand
