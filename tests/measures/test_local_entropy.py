"""The estimate of the local entropy in closed form."""

import jax
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


SPECTRUM = np.r_[7.0, 3.0, 1.0, 0.5, np.zeros(5)]


BOWL, MATRIX, MINIMUM = problem.quadratic(SPECTRUM)


def test_local_entropy_of_a_quadratic():
    result = measures.local_entropy_estimate(BOWL, MINIMUM, gamma=4.0, beta=2.0, num_samples=20000)
    exact = -0.5 * np.sum(np.log1p(2.0 * SPECTRUM / 4.0))
    assert abs(result.value - exact) < 4 * result.standard_error
    assert 100 < result.effective_samples < 20000
