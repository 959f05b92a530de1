"""Exponential averages: the recorded runs and the shares of their models."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flatopt
from tests.averaging.feed import WEIGHTS, evaluated
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer


@replays("ema_torch")
def test_replays(golden: Golden) -> None:
    """PyTorch's average starts from the first weights: no debiasing."""
    hyper = golden.hyper
    average = flatopt.params_ema(
        hyper["decay"], debias=False, start=hyper["start"], every=hyper["freq"]
    )
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


@pytest.mark.parametrize("warmup_steps", [None, 3])
@pytest.mark.parametrize("debias", [True, False])
def test_shares_of_the_closed_form(debias: bool, warmup_steps: int | None):
    n = len(WEIGHTS)
    decays = np.full(n, 0.7)
    if warmup_steps:
        decays = np.minimum(decays, (1 + np.arange(n)) / (warmup_steps + np.arange(n)))
    shares = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    if debias:
        shares /= shares.sum()
    else:
        shares[0] = np.prod(decays[1:])
    np.testing.assert_allclose(shares.sum(), 1)
    stage = flatopt.params_ema(0.7, debias=debias, warmup_steps=warmup_steps)
    np.testing.assert_allclose(evaluated(stage), shares @ WEIGHTS, rtol=1e-5)


def test_decays_at_the_ends_of_their_range():
    np.testing.assert_allclose(evaluated(flatopt.params_ema(0.0)), WEIGHTS[-1], rtol=1e-6)
    nearly = flatopt.params_ema(1 - 1e-5)  # Debiased, it is the mean.
    np.testing.assert_allclose(evaluated(nearly), WEIGHTS.mean(), rtol=1e-3)
    with pytest.raises(ValueError, match="decay=1 is out of range"):
        flatopt.params_ema(1)


@given(
    st.sampled_from([0.5, 1e-3, 1e-7, 1e-9, 1e-12]),
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_decays_however_near_to_one(gap: float, values: list[float], scheduled: bool):
    """In float32, 1 - 1e-9 is 1; what counts is 1 - decay, taken before the cast."""
    decay = 1 - gap
    stage = flatopt.params_ema((lambda step: decay) if scheduled else decay)
    state = stage.init(jnp.float32(0))
    for value in values:
        _, state = stage.update(jnp.float32(0), state, jnp.float32(value))
    shares = np.array([decay**i for i in range(len(values))][::-1])
    expected = float(np.sum(shares * values) / np.sum(shares))
    found = float(flatopt.eval_params(state, jnp.float32(0)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
