"""Paired differences, and Holm's correction."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.claims.statistics import Difference, count, holm, paired


def test_a_paired_difference_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    base = rng.normal(size=8)
    values = base + rng.normal(0.3, 0.2, size=8)
    found = paired(values, base)
    assert found.mean == pytest.approx((values - base).mean())
    assert found.error == pytest.approx(stats.sem(values - base))
    assert found.p == pytest.approx(stats.ttest_rel(values, base).pvalue)
    assert found.seeds == 8


def test_what_all_seeds_share_cancels():
    found = paired([1.5, 2.5, 9.5], [1.0, 2.0, 9.0])
    assert found == Difference(0.5, 0.0, 0.0, 3)
    assert paired([1.0, 2.0], [1.0, 2.0]).outcome == "tied"


@pytest.mark.parametrize(("mean", "outcome"), [(1.1, "won"), (1.0, "tied"), (-1.1, "lost")])
def test_tied_is_within_one_standard_error(mean, outcome):
    assert Difference(mean, 1.0, 0.5, 8).outcome == outcome


def test_outcomes_are_counted():
    found = [Difference(mean, 1.0, 0.5, 8) for mean in (2.0, 3.0, 0.0, -2.0)]
    assert count(found) == {"won": 2, "tied": 1, "lost": 1}


def test_holm_stops_at_the_first_that_fails():
    # 0.05/4 = .0125, 0.05/3 = .0167, 0.05/2 = .025: the third fails, so the fourth does not stand.
    assert holm({"a": 0.01, "b": 0.016, "c": 0.03, "d": 0.04}) == {"a", "b"}
    assert holm({"a": 0.013, "b": 0.013, "c": 0.013, "d": 0.013}) == set()
    assert holm({}) == set()


@pytest.mark.parametrize(
    ("values", "base"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, np.nan], [1.0, 2.0])]
)
def test_what_cannot_be_compared_is_refused(values, base):
    with pytest.raises(ValueError, match="must"):
        paired(values, base)
