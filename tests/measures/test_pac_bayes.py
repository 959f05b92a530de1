"""The PAC-Bayes radius of a quadratic."""

import jax
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_pac_bayes_sigma_of_a_quadratic():
    loss, matrix, params = problem.quadratic(np.linspace(1, 3, 300))
    result = measures.pac_bayes_sigma(loss, params, target=0.1, num_samples=64)
    np.testing.assert_allclose(result.sigma, np.sqrt(0.2 / np.trace(matrix)), rtol=0.03)
    np.testing.assert_allclose(result.rise, 0.1, rtol=1e-4)
    at_limit = measures.pac_bayes_sigma(loss, params, target=1e9, limits=(1e-3, 1e-2))
    np.testing.assert_allclose(at_limit.sigma, 1e-2, rtol=1e-4)
