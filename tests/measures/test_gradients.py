"""Gradient norms and Fisher traces against sums by hand."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_gradient_norm():
    params, data = problem.params(), problem.batches()
    grads = jax.grad(problem.loss_fn)(params, problem.flat_data(data))
    expected = np.linalg.norm(ravel_pytree(grads)[0])
    np.testing.assert_allclose(measures.gradient_norm(problem.loss_fn, params, data), expected)
    only = measures.gradient_norm(
        problem.loss_fn, params, data, mask={"first": True, "second": False}
    )
    np.testing.assert_allclose(only, np.linalg.norm(ravel_pytree(grads["first"])[0]))


def test_fisher_trace_is_that_of_the_gauss_newton_matrix():
    params, data = problem.params(), problem.batches()
    exact = np.trace(problem.dense_gauss_newton(params, data, "softmax_cross_entropy"))
    result = measures.fisher_trace(problem.model_fn, params, data, num_samples=60)
    assert abs(result.value - exact) < 3 * result.standard_error
    assert result.standard_error < 0.2 * exact


def test_empirical_fisher_trace():
    params, data = problem.params(), problem.batches()
    whole = problem.flat_data(data)
    squares = [
        np.sum(
            ravel_pytree(
                jax.grad(problem.loss_fn)(params, jax.tree.map(lambda x, i=i: x[i : i + 1], whole))
            )[0]
            ** 2
        )
        for i in range(len(whole[0]))
    ]
    result = measures.fisher_trace(problem.model_fn, params, data, labels=lambda batch: batch[1])
    np.testing.assert_allclose(result.value, np.mean(squares), rtol=1e-9)
    assert result.standard_error == 0
