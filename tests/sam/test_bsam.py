"""Bayes-SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import rng
from tests import cases


def test_a_step_by_hand():
    """The published program's order: the step divides by the precision of before."""
    rate, rho, n, b1, b2, delta, gamma = 0.5, 0.05, 40.0, 0.8, 0.9, 0.01, 0.1
    tx = flatopt.bsam(rate, rho, num_data=n, b1=b1, b2=b2, weight_decay=delta, damping=gamma, key=3)
    slopes, w = np.array([1.0, 4.0]), np.array([3.0, -1.0])
    m, s = np.zeros(2), np.ones(2)
    params, state = jnp.asarray(w, jnp.float32), tx.init(jnp.asarray(w, jnp.float32))
    data = rng.Stream(3).init()
    grad_fn = lambda p, i: jnp.asarray(slopes, p.dtype) * p  # noqa: E731
    for _ in range(3):
        data, use = rng.Stream(3).split(data)
        z = np.asarray(rng.normal_like(use, params), float)
        g = slopes * (w + z / np.sqrt(n * s))
        m = b1 * m + (1 - b1) * (slopes * (w + rho * g / s) + delta * w)
        w = w - rate * m / s
        s = b2 * s + (1 - b2) * (np.sqrt(s) * np.abs(g) + delta + gamma)
        updates, state = tx.update(params, state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, w, rtol=1e-5)
        np.testing.assert_allclose(optax.tree.get(state, "precision"), s, rtol=1e-5)


def test_with_fixed_precision_and_much_data_it_is_sam_without_a_norm():
    """b2 near 1 keeps s at 1, N near infinity draws no noise: raw SAM under Adam's mean."""
    kwargs = {"b2": 1 - 1e-7, "weight_decay": 0.0, "num_data": 1e30}
    method, _ = cases.run(flatopt.bsam(0.1, 0.05, **kwargs))
    raw = flatopt.gradient_at(optax.scale(0.05))
    ema = optax.ema(0.9, debias=False)
    expected, _ = cases.run(optax.chain(raw, ema, optax.scale_by_learning_rate(0.1)))
    cases.assert_close(method, expected, rtol=1e-4, atol=1e-6)


def test_the_posterior_of_a_quadratic_is_narrow_where_it_is_steep():
    """At the end the gradients are those of the draws: s = sqrt(s) |h z| / sqrt(N s) + floor."""
    slopes = jnp.array([0.5, 5.0, 50.0])
    n, floor = 100.0, 0.01
    tx = flatopt.bsam(
        optax.cosine_decay_schedule(0.02, 20000), 0.0, num_data=n, weight_decay=0.0, damping=floor
    )
    params = jnp.zeros(3)
    grad_fn = lambda w, i: slopes * w  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "precision")

    _, precisions = jax.lax.scan(step, (params, tx.init(params)), length=20000)
    # The mean of |z| is sqrt(2 / pi), and the scale of the draws cancels in sqrt(s) |g|.
    expected = slopes * np.sqrt(2 / np.pi) / np.sqrt(n) + floor
    np.testing.assert_allclose(precisions[-5000:].mean(axis=0), expected, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("num_data", 0.0),
        ("initial_precision", 0.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("weight_decay", -1.0),
        ("damping", np.inf),
        ("rho", -0.1),
        ("learning_rate", -0.1),
    ],
)
def test_arguments_out_of_range(name: str, bad: float):
    arguments = {"learning_rate": 0.1, "rho": 0.1, "num_data": 10.0, name: bad}
    with pytest.raises(ValueError, match=rf"{name}=.* out of range"):
        flatopt.bsam(**arguments)
