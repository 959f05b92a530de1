"""Friendly-SAM."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.friendly_sam(RHO, sigma=0.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_the_ascent_follows_what_is_new_in_the_gradient():
    """The mean of what came before, all of it, is left out of the direction."""
    direction = flatopt.subtract_gradient_ema(sigma=1.0, decay=0.9)
    steady, noise = jnp.array([1.0, 2.0]), jnp.array([0.1, -0.2])
    state = direction.init(steady)
    _, state = direction.update(steady, state)
    followed, _ = direction.update(steady + noise, state)
    np.testing.assert_allclose(followed, noise, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_shows_and_is_forgotten(bad):
    stage, w = flatopt.friendly_sam(RHO), jnp.array([3.0, 4.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    _, state = stage.update(w, stage.init(w), w, grad_fn=grad_fn)
    updates, after = stage.update(w.at[1].set(bad), state, w, grad_fn=grad_fn)
    assert not jnp.isfinite(updates).all()
    ema = optax.tree.get(after, "ema")
    np.testing.assert_array_equal(ema, optax.tree.get(state, "ema"))


@pytest.mark.parametrize(
    "make",
    [functools.partial(flatopt.subtract_gradient_ema, 1.0), flatopt.smooth_gradient],
    ids=["subtract_gradient_ema", "smooth_gradient"],
)
def test_a_mean_in_half_precision_does_not_overflow_for_good(make):
    direction = make(decay=0.5, accumulator_dtype=jnp.float16)
    state = direction.init(jnp.zeros(2))
    for size in (1.0, 1e6, 1.0):
        _, state = direction.update(jnp.full(2, size), state)
    assert jnp.isfinite(state.ema).all()
    assert state.step == 2


@replays("fsam")
def test_replays_fsam(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.friendly_sam(
        hyper["rho"], sigma=hyper["sigma"], decay=hyper["lmbda"], adaptive=hyper["adaptive"]
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    buffers = {"ema": lambda s: optax.tree.get(s, "ema")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))
