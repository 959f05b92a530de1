"""SWA: the recorded runs, a closed form, its schedule and where that is constant."""

import jax
import numpy as np
import optax
import pytest

import flatopt
from tests.averaging.feed import noisy_run, sgd_variance
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer


@replays("swa_torch")
def test_replays_pytorch(golden: Golden) -> None:
    hyper = golden.hyper
    average = flatopt.swa(start=hyper["start"], every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


@replays("swa_repo")
def test_replays_the_authors(golden: Golden) -> None:
    """The SWA authors count epochs from 1 and average after each one that is due.

    Their start is a float, and an epoch is due at a whole distance from it: none is when the start
    is not whole.
    """
    hyper, epoch_len = golden.hyper, golden.epoch_len
    tx = torch_optimizer(hyper, golden.learning_rate)
    if hyper.get("swa", True) and float(hyper["swa_start"]).is_integer():
        start, every = int(hyper["swa_start"]), int(hyper["swa_c_epochs"])
        tx = optax.chain(tx, flatopt.swa(start=start * epoch_len, every=every * epoch_len))
    assert_agrees(golden.results, replay(golden, tx))


@pytest.mark.parametrize("every", [1, 5])
def test_swa_variance_of_a_stationary_run(every: int):
    """The mean of n correlated points: V / n^2 (n + 2 sum over j of (n - j) phi^j)."""
    rate, curvature, samples, models = 0.2, 1.0, 20_000, 40
    tx = optax.chain(optax.sgd(rate), flatopt.swa(start=100, every=every))
    params, state = noisy_run(tx, 100 + every * (models - 1), curvature, samples)
    phi = (1 - rate * curvature) ** every
    lags = np.arange(1, models)
    factor = (models + 2 * np.sum((models - lags) * phi**lags)) / models**2
    mean = np.asarray(flatopt.eval_params(state, params))
    last = np.mean(np.asarray(params) ** 2)
    tolerance = 4 * np.sqrt(2 / samples)
    np.testing.assert_allclose(last, sgd_variance(rate, curvature), rtol=tolerance)
    expected = factor * sgd_variance(rate, curvature)
    np.testing.assert_allclose(np.mean(mean**2), expected, rtol=tolerance)
    assert factor < 0.3


def test_constant_phase_start():
    schedule = flatopt.swa_schedule(
        0.1, 0.05, transition_steps=20, transition_begin=30, shape="linear"
    )
    start = flatopt.constant_phase_start(schedule, 100)
    # Update number 51 is the first that the final rate makes: its count is 50.
    assert start == 51
    assert schedule(49) > schedule(50) == schedule(99)
    assert flatopt.constant_phase_start(optax.constant_schedule(0.1), 10) == 1
    cosine = optax.cosine_decay_schedule(0.1, 40, alpha=0.5)
    assert flatopt.constant_phase_start(cosine, 100) == 41
    with pytest.raises(ValueError, match="no constant phase within num_steps=40"):
        flatopt.constant_phase_start(cosine, 40)
    inside = jax.jit(lambda x: x + flatopt.constant_phase_start(schedule, 100))(0)
    assert inside == 51


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_swa_schedule_jumps_without_a_transition(shape: str):
    schedule = flatopt.swa_schedule(0.1, 0.05, transition_steps=0, transition_begin=3, shape=shape)
    np.testing.assert_allclose([schedule(t) for t in (2, 3)], [0.1, 0.05])
    with pytest.raises(ValueError, match="shape='step' must be one of cosine, linear"):
        flatopt.swa_schedule(0.1, 0.05, transition_steps=1, shape="step")
    with pytest.raises(ValueError, match="swa_value=-1 is out of range"):
        flatopt.swa_schedule(0.1, -1, transition_steps=1)
