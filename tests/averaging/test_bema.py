"""BEMA: the recorded runs, its limits, and the lag that it takes away."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.bema import correct, power_of_time
from tests.averaging.feed import WEIGHTS, evaluated, feed
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer


@replays("bema")
def test_replays(golden: Golden) -> None:
    """The plain mean is recorded too, as it is after each of its updates."""
    hyper = golden.hyper
    begin, every = hyper["update_after"], hyper["update_freq"]
    average = flatopt.bema(
        hyper["ema_power"],
        hyper["bias_power"],
        lag=hyper["lag"],
        multiplier=hyper["multiplier"],
        min_share=hyper.get("min_ema_multiplier", 0.0),
        start=begin + every,
        every=every,
    )
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    replayed = replay(golden, tx, buffers={"ema": lambda state: state[-1].ema})
    at = golden.arrays["avg_at_step"] - 1
    replayed = {k: v[at] if k.startswith("ema/") else v for k, v in replayed.items()}
    assert_agrees(golden.results, replayed)


def _by_hand(weights, kappa, eta, lag, begin, every):
    """The corrected mean of a run that starts at 0, in plain numbers."""
    run = np.concatenate([[0.0], weights])
    initial = ema = run[begin]
    mean = None
    for t in range(begin + every, len(run), every):
        ema = ema + (lag + t) ** -kappa * (run[t] - ema)
        mean = ema + (lag + t) ** -eta * (run[t] - initial)
    return mean


@pytest.mark.parametrize(("begin", "every"), [(0, 1), (0, 2), (2, 1), (3, 2)])
def test_the_mean_of_the_formula(begin: int, every: int):
    stage = flatopt.bema(0.6, 0.3, lag=2.0, start=begin + every, every=every)
    expected = _by_hand(WEIGHTS, 0.6, 0.3, 2.0, begin, every)
    np.testing.assert_allclose(evaluated(stage), expected, rtol=1e-5)


def test_without_correction_it_is_an_exponential_mean_from_the_initial_weights():
    """A large power of the bias leaves nothing of it; with power 0 every share is 1."""
    plain = flatopt.params_ema(lambda step: 1 - (11.0 + step) ** -0.5, debias=False, initial=True)
    np.testing.assert_allclose(
        evaluated(flatopt.bema(0.5, 100.0)), evaluated(plain), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(evaluated(flatopt.bema(0.0, 100.0)), WEIGHTS[-1], rtol=1e-6)


def test_on_a_straight_way_it_lags_less_than_its_exponential_mean():
    way = np.linspace(0.1, 2.0, 20)
    state = feed(flatopt.bema(0.5, 0.5), way)
    lag, corrected = way[-1] - float(state.ema), way[-1] - float(state.mean)
    assert abs(corrected) < 0.2 * lag
    assert lag > 0.2


def test_weights_that_have_settled_are_evaluated_further_on():
    """The price of the correction: it goes on along the whole way from the initial weights."""
    state = feed(flatopt.bema(0.5, 0.2), np.ones(200))
    np.testing.assert_allclose(state.ema, 1.0, rtol=1e-4)
    np.testing.assert_allclose(state.mean, 1 + 210**-0.2, rtol=1e-4)


def test_before_its_first_model_the_parameters_are_evaluated():
    stage = flatopt.bema(start=5, every=2)
    np.testing.assert_allclose(evaluated(stage, WEIGHTS[:4]), WEIGHTS[3], rtol=1e-6)
    state = feed(stage, WEIGHTS[:4])
    np.testing.assert_allclose(state.initial, WEIGHTS[2], rtol=1e-6)  # After 3 updates.
    assert state.number == 0


def test_a_first_model_before_the_end_of_a_period_is_measured_from_the_start():
    state = feed(flatopt.bema(start=2, every=5), WEIGHTS)
    assert state.number == 2  # After 2 and 7 updates.
    assert state.initial == 0


def test_shares_never_exceed_one():
    assert power_of_time(jnp.int32(1), 0.5, lag=0.0, multiplier=0.1) == 1
    assert power_of_time(jnp.int32(3), 0.5, lag=1.0, multiplier=1.0) == 0.5
    assert evaluated(flatopt.bema(0.5, 0.5, lag=0.0, multiplier=0.0)) == pytest.approx(
        2 * WEIGHTS[-1]
    )


def test_integer_leaves_are_those_of_the_last_model():
    ema, params = {"w": jnp.ones(2), "n": jnp.array(3)}, {"w": jnp.zeros(2), "n": jnp.array(5)}
    mean = correct(ema, params, {"w": jnp.full(2, 2.0), "n": jnp.array(1)}, 0.5)
    np.testing.assert_allclose(mean["w"], 0.0)
    assert mean["n"] == 5


@pytest.mark.parametrize(
    "kwargs", [{"lag": -1.0}, {"multiplier": -1.0}, {"min_share": 1.5}, {"eta": -0.1}, {"every": 0}]
)
def test_arguments_out_of_range_raise(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        flatopt.bema(**kwargs)
