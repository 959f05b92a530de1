"""Periodic SWA: the recorded runs, when it restarts, and when it stops."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import ATOL, RTOL, Golden, assert_agrees, replay, replays, torch_optimizer


@replays("pswa")
def test_replays_pswa(golden: Golden) -> None:
    """Restarts every P epochs, up to the start of the final phase."""
    hyper = golden.hyper
    begin, number, stop = hyper["pswa_start"], hyper["P"], hyper["swa_start"]
    restarts = range(begin + number, min(stop, hyper["epochs"]) + 1, number)
    _assert_restarts(golden, begin, restarts, period=number, stop=stop)


@replays("dswa")
def test_replays_dswa(golden: Golden) -> None:
    begin, restart = (golden.hyper[key] for key in ("swa_start", "dswa_start"))
    _assert_restarts(golden, begin, [restart], period=[restart - begin])


@replays("tswa")
def test_replays_tswa(golden: Golden) -> None:
    begin, first, second = (golden.hyper[f"{key}swa_start"] for key in ("", "d", "t"))
    _assert_restarts(golden, begin, [first, second], period=[first - begin, second - first])


def _assert_restarts(
    golden: Golden,
    begin: int,
    restarts: Sequence[int],
    period: int | Sequence[int],
    stop: int | None = None,
) -> None:
    """Replays periodic averaging; all numbers are of epochs.

    Where it restarts, the file has the weights before the restart, and flatopt has those after it:
    the average. The weights before it are recovered from the average that they entered.
    """
    steps, hyper = golden.epoch_len, golden.hyper
    updates = period * steps if isinstance(period, int) else [n * steps for n in period]
    tx = flatopt.periodic_swa(
        torch_optimizer(hyper, golden.learning_rate),
        updates,
        start=(begin + 1) * steps,
        every=steps,
        stop=None if stop is None else stop * steps,
    )
    replayed = replay(golden, tx)
    results = golden.results
    before = [begin, *(epoch for epoch in restarts if epoch * steps <= golden.steps)]
    for name in golden.tree("p0"):
        evaluated = replayed[f"eval/{name}"]
        starts = replayed[f"traj/{name}"][:-1:steps]
        replayed[f"epoch_start/{name}"] = starts
        trajectory = replayed[f"traj/{name}"].copy()
        for last, epoch in itertools.pairwise(before):
            t, number = epoch * steps, epoch - last
            np.testing.assert_allclose(trajectory[t], results[f"eval/{name}"][t], RTOL, ATOL)
            mean, old = evaluated[t], evaluated[t - steps]
            trajectory[t] = mean if number == 1 else old + number * (mean - old)
        replayed[f"traj/{name}"] = trajectory
    assert_agrees(results, replayed)


def test_periodic_swa_restarts_stops_and_goes_on_averaging():
    grads, trajectory = jnp.array(-1.0), []
    tx = flatopt.periodic_swa(optax.sgd(1.0), period=2, start=2, stop=5)
    w, evaluated = jnp.array(0.0), []
    state = tx.init(w)
    for _ in range(8):
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        trajectory.append(float(w))
        evaluated.append(float(flatopt.eval_params(state, w)))
    # Restarts after updates 3 (mean of 2, 3) and 5 (mean of 3.5, 4.5), then no more.
    assert trajectory == [1, 2, 2.5, 3.5, 4, 5, 6, 7]
    assert evaluated == [1, 2, 2.5, 3.5, 4, 5, 5.5, 6]
    assert state.restarts == 2


def test_double_and_triple_averaging_are_lists_of_periods():
    def run(period: Any, stop: int | None = None) -> Any:
        tx = flatopt.periodic_swa(cases.sgd(), period, start=2, stop=stop)
        return cases.run(tx, steps=7)

    cases.assert_equal(run([2]), run(2, stop=3))
    cases.assert_equal(run([2, 2]), run(2, stop=5))
    _, state = run([1, 3])
    assert (state.restarts, state.number) == (2, 2)


def test_wrong_periods_say_so():
    with pytest.raises(ValueError, match="period=5 must be a multiple of every=2"):
        flatopt.periodic_swa(cases.sgd(), 5, every=2)
    with pytest.raises(ValueError, match=r"period=\[\] is empty"):
        flatopt.periodic_swa(cases.sgd(), [])


@pytest.mark.parametrize("period", [np.int64(4), [np.int64(4)] * 3, np.array([4, 4, 4])], ids=repr)
def test_periods_are_integers_of_any_kind(period):
    found, _ = cases.run(flatopt.periodic_swa(cases.sgd(), period), steps=9)
    expected, _ = cases.run(flatopt.periodic_swa(cases.sgd(), 4), steps=9)
    cases.assert_equal(found, expected)


@pytest.mark.parametrize("period", [None, 4.0, "4", True, [4.0]], ids=repr)
def test_what_is_no_period_is_refused_by_name(period):
    with pytest.raises(TypeError, match="period="):
        flatopt.periodic_swa(cases.sgd(), period)
