"""Sharpness in a box in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def _separable(params, batch=None):
    """A quadratic without coupling, on every leaf; the mean over batches has curvature 2, 4, 6."""
    del batch
    return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * params["w"] ** 2)


@pytest.mark.parametrize("method", ["l-bfgs-b", "projected"])
def test_keskar_sharpness_in_closed_form(method):
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    value = measures.keskar_sharpness(_separable, params, epsilon=0.1, method=method, num_steps=30)
    w = np.array([1.0, 2.0, 3.0])
    loss, highest = (np.sum(w * x**2) for x in (w, w + 0.1 * (w + 1)))
    np.testing.assert_allclose(value, 100 * (highest - loss) / (1 + loss), rtol=1e-6)


def test_both_ways_to_keskar_agree_on_a_network():
    params, data = problem.params(), problem.batches()
    arguments = (problem.loss_fn, params, data)
    scipy = measures.keskar_sharpness(*arguments, epsilon=1e-3, num_steps=50)
    projected = measures.keskar_sharpness(
        *arguments, epsilon=1e-3, num_steps=50, method="projected"
    )
    assert scipy > 0
    np.testing.assert_allclose(projected, scipy, rtol=1e-3)
