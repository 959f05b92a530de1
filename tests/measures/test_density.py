"""Spectral densities against exact dense Hessians, in float64."""

import jax
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_moments_of_the_density():
    params, data = problem.params(), problem.batches()
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    result = measures.spectral_density(
        problem.loss_fn, params, data, num_probes=problem.SIZE, num_steps=problem.SIZE
    )
    eigenvalues = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(result.weights.sum(axis=1), 1, rtol=1e-10)
    for p in (1, 2, 3, 4):
        moment = np.mean(np.sum(result.weights * result.nodes**p, axis=1))
        np.testing.assert_allclose(moment, np.mean(eigenvalues**p), rtol=1e-6)


def test_density_is_a_density_and_near_the_exact_one():
    params, data = problem.params(), problem.batches()
    eigenvalues = np.linalg.eigvalsh(problem.dense_hessian(problem.loss_fn, params, data))
    result = measures.spectral_density(problem.loss_fn, params, data, num_probes=20, width=0.05)
    step = result.grid[1] - result.grid[0]
    np.testing.assert_allclose(np.sum(result.density) * step, 1, rtol=1e-3)
    bumps = np.exp(-0.5 * ((result.grid[:, None] - eigenvalues[None]) / 0.05) ** 2)
    exact = bumps.mean(axis=1) / (0.05 * np.sqrt(2 * np.pi))
    off = abs(np.asarray(result.density) - exact)
    assert np.mean(off <= 3 * result.standard_error + 1e-3) > 0.95
    assert off.max() < 0.2 * exact.max()


def test_one_probe_has_no_standard_error():
    loss, _, params = problem.quadratic(np.arange(1.0, 10))
    result = measures.spectral_density(loss, params, num_probes=1)
    assert np.isnan(result.standard_error).all()
    assert np.isnan(measures.trace(loss, params, num_products=1).standard_error)
