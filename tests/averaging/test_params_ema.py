"""Exponential averages: the recorded runs and the shares of their models."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flatopt
from tests import cases
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


def test_from_the_initial_weights_it_is_the_usual_loop():
    """`average = incremental_update(params, average, 1 - decay)`, from a copy of the parameters."""
    tx = optax.chain(cases.sgd(), flatopt.params_ema(0.9, debias=False, initial=True))
    params = average = cases.init_params()
    opt_state, step = tx.init(params), jax.jit(cases.train_step(tx))
    cases.assert_equal(flatopt.eval_params(opt_state, params), params)
    for i in range(5):
        params, opt_state = step(params, opt_state, cases.make_batch(i))
        average = optax.incremental_update(params, average, 0.1)
        cases.assert_close(flatopt.eval_params(opt_state, params), average)
    first = cases.run(optax.chain(cases.sgd(), flatopt.params_ema(0.9, debias=False)), steps=5)
    difference = optax.tree.sub(flatopt.eval_params(first[1], first[0]), average)
    assert optax.tree.norm(difference) > 0.01


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize(("start", "every"), [(None, 2), (3, 2), (5, 2), (1, 2)])
def test_initial_weights_are_those_at_the_beginning_of_the_first_period(start, every, debias):
    run = np.concatenate([[0.5], WEIGHTS])  # It starts at 0.5.
    when = dict(start=start, every=every)
    stage = flatopt.params_ema(0.7, debias=debias, initial=True, warmup_steps=3, **when)
    state = stage.init(jnp.float32(run[0]))
    for before, after in itertools.pairwise(run):
        move = jnp.float32(after - before)
        _, state = stage.update(move, state, jnp.float32(before))
    first = start or every
    taken = [run[max(first - every, 0)], *run[first::every]]
    mean, total = 0.0, 0.0
    for n, w in enumerate(taken):
        c = 1 - min(0.7, (1 + n) / (3 + n))
        total = total + c * (1 - total) if debias else 1.0
        mean += (c / total if debias else c if n else 1.0) * (w - mean)
    np.testing.assert_allclose(flatopt.eval_params(state, jnp.float32(0)), mean, rtol=1e-5)


def test_the_rising_decay_of_another_library():
    """As timm's `ModelEmaV3(use_warmup=True)`, which is given the number of the update, from 1."""
    kwargs = {"gamma": 2.0, "power": 0.75, "min_decay": 0.3}
    stage = flatopt.params_ema(flatopt.ema_decay_schedule(0.6, **kwargs), debias=False)
    mean = 0.0
    for number, w in enumerate(WEIGHTS, start=1):
        step = max(0, number - 1)
        decay = max(min(1 - (1 + step / 2.0) ** -0.75, 0.6), 0.3) if step > 0 else 0.0
        mean = decay * mean + (1 - decay) * w
    np.testing.assert_allclose(evaluated(stage), mean, rtol=1e-5)
    plain = flatopt.params_ema(flatopt.ema_decay_schedule(0.999, power=1.0), debias=False)
    np.testing.assert_allclose(evaluated(plain), WEIGHTS.mean(), rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{"decay": 1.0}, {"gamma": 0.0}, {"power": -1.0}])
def test_a_rising_decay_out_of_range_raises(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        flatopt.ema_decay_schedule(**{"decay": 0.9, **kwargs})


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
