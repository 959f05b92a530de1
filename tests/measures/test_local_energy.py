"""Local energy against closed forms."""

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


def test_local_energy_of_a_quadratic():
    w = np.array([1.0, -2.0, 3.0])
    sigmas = jnp.array([0.0, 0.1, 0.4])
    result = measures.local_energy(
        _separable, {"w": jnp.asarray(w)}, sigmas=sigmas, num_samples=4000
    )
    expected = sigmas**2 * np.sum(np.array([1.0, 2.0, 3.0]) * w**2)
    assert result.energy[0] == 0
    assert (abs(result.energy - expected)[1:] < 4 * result.standard_error[1:]).all()
    np.testing.assert_allclose(result.error, _separable({"w": jnp.asarray(w)}))


def test_local_energy_of_errors_over_batches():
    params, data = problem.params(), problem.batches()
    stacked = measures.local_energy(problem.error_fn, params, data, sigmas=[0.0, 0.5, 5.0])
    listed = measures.local_energy(
        problem.error_fn, params, [problem.flat_data(data)], sigmas=[0.0, 0.5, 5.0]
    )
    np.testing.assert_allclose(stacked.energy, listed.energy, atol=1e-12)
    np.testing.assert_allclose(stacked.error, problem.error_fn(params, problem.flat_data(data)))
    assert (stacked.standard_error[1:] > 0).all()
