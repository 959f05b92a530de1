"""Langevin dynamics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

WALKERS = 20_000  # Coordinates of one quadratic: as many independent Langevin loops.


# Langevin
@pytest.mark.parametrize("temperature", [0.1, 2.0])
@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_langevin_samples_the_gaussian(curvature: float, temperature: float):
    rate = 0.1 / curvature
    tx, w = flatopt.langevin(rate, temperature, key=3), jnp.zeros([WALKERS])

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(curvature * w, state, w)
        return (w + updates, state), None

    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=150)
    variance = temperature / (curvature * (1 - rate * curvature / 2))
    assert abs(float(w.var()) - variance) < 4 * variance * np.sqrt(2 / WALKERS)
    assert abs(float(w.mean())) < 4 * np.sqrt(variance / WALKERS)


def test_langevin_at_zero_temperature_is_gradient_descent():
    cases.assert_equal(cases.run(flatopt.langevin(0.05, 0.0))[0], cases.run(optax.sgd(0.05))[0])


def test_langevin_behind_local_entropy_is_entropy_sgld():
    """The outer loop samples exp(-F / T): on a quadratic, again a Gaussian, of lower curvature."""
    curvature, gamma, temperature = 2.0, 1.0, 0.5
    tx = optax.chain(
        flatopt.local_entropy(
            15,
            gamma,
            inner_learning_rate=0.5 / (curvature + gamma),
            noise=0.0,
            averaging=0.0,
            scale_by_gamma=True,
        ),
        flatopt.langevin(0.1, temperature),
    )
    grad_fn = lambda w, i: curvature * w  # noqa: E731

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(curvature * w, state, w, grad_fn=grad_fn)
        return (w + updates, state), None

    w = jnp.zeros([WALKERS])
    (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=150))((w, tx.init(w)))
    effective = gamma * curvature / (gamma + curvature)
    variance = temperature / (effective * (1 - 0.1 * effective / 2))
    assert abs(float(w.var()) - variance) < 4 * variance * np.sqrt(2 / WALKERS)
