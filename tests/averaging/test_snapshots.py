"""Snapshots: which models, in which order, and that they are not evaluation weights."""

import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.averaging.feed import WEIGHTS, feed


def test_snapshots_come_oldest_first_before_and_after_the_ring_is_full():
    for n in range(1, 8):
        stack, number = flatopt.snapshot_params(feed(flatopt.snapshots(3), WEIGHTS[:n]))
        latest = WEIGHTS[max(0, n - 3) : n]
        assert number == len(latest)
        np.testing.assert_allclose(stack[:number], latest, rtol=1e-6)
    stack, number = flatopt.snapshot_params(feed(flatopt.snapshots(4, start=2, every=2)))
    np.testing.assert_allclose(stack[:number], WEIGHTS[[1, 3, 5]], rtol=1e-6)


def test_snapshots_are_not_evaluation_weights_and_there_must_be_one_stage():
    tx = optax.chain(cases.sgd(), flatopt.snapshots(2))
    params, state = cases.run(tx)
    cases.assert_equal(flatopt.eval_params(state, params), params)
    with pytest.raises(ValueError, match="holds 0 states"):
        flatopt.snapshot_params(cases.sgd().init(params))
    with pytest.raises(ValueError, match="holds 2 states"):
        flatopt.snapshot_params((state, state))
