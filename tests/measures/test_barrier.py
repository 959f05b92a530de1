"""The barrier on a line."""

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


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([1.0, 4.0, 2.0], -2.5), ([1.0, 0.2, 1.0], 0.8), ([1.0, 1.0, 1.0], 0.0)],
)
def test_mode_connectivity_has_a_sign(losses, expected):
    np.testing.assert_allclose(measures.mode_connectivity(losses), expected)
    assert np.isnan(measures.mode_connectivity([losses[0], np.nan, 1.0]))


def test_mode_connectivity_of_a_barrier_between_equal_ends_is_its_height():
    w = jnp.ones(2)
    barrier = measures.linear_barrier(lambda w: jnp.sum((w**2 - 1) ** 2), w, -w)
    np.testing.assert_allclose(measures.mode_connectivity(barrier.losses), -barrier.height)


@pytest.mark.parametrize("losses", [[1.0], [[1.0, 2.0]]])
def test_mode_connectivity_needs_a_profile(losses):
    with pytest.raises(ValueError, match="losses has shape"):
        measures.mode_connectivity(jnp.asarray(losses))
