"""The barrier on a line."""

import jax
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_linear_barrier():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    result = measures.linear_barrier(problem.loss_fn, first, second, data, num_points=5)
    whole = problem.flat_data(data)
    losses = [
        problem.loss_fn(jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, first, second), whole)
        for t in np.linspace(0, 1, 5)
    ]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-10)
    np.testing.assert_allclose(result.height, max(losses - np.linspace(losses[0], losses[-1], 5)))
