"""Traces against exact dense Hessians, in float64."""

import jax
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def _as_list(data):
    return [jax.tree.map(lambda x, i=i: x[i], data) for i in range(len(data[0]))]


# The four ways in which data may come.
FORMS = {
    "stacked": lambda data: data,
    "list": _as_list,
    "function": lambda data: lambda: iter(_as_list(data)),
    "uneven": lambda data: [
        jax.tree.map(lambda x: x[:13], problem.flat_data(data)),
        jax.tree.map(lambda x: x[13:], problem.flat_data(data)),
    ],
}


@pytest.mark.parametrize("form", ["stacked", "list"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace_within_three_standard_errors(method, form):
    params, data = problem.params(), problem.batches()
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    result = measures.trace(
        problem.loss_fn, params, FORMS[form](data), num_products=60, method=method, key=3
    )
    assert abs(result.value - np.trace(dense)) <= 3 * result.standard_error
    assert 0 < result.standard_error < 0.4 * np.trace(dense)
    assert result.num_products == 60


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_standard_errors_are_honest(method):
    params, data = problem.params(), problem.batches()
    exact = np.trace(problem.dense_hessian(problem.loss_fn, params, data))
    deviations = []
    for key in range(12):
        result = measures.trace(
            problem.loss_fn, params, data, num_products=18, method=method, key=key
        )
        deviations.append((result.value - exact) / result.standard_error)
    # Neither far too small nor far too large: the deviations have a spread of about one.
    assert 0.5 < np.sqrt(np.mean(np.square(deviations))) < 1.7


@pytest.mark.parametrize("spectrum", ["full", "low rank", "zero"])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_trace_is_exact_at_full_rank(method, spectrum):
    eigenvalues = {
        "full": np.linspace(-2, 7, 20),
        "low rank": np.r_[5.0, 3.0, -2.0, np.zeros(17)],
        "zero": np.zeros(20),
    }[spectrum]
    loss, matrix, params = problem.quadratic(eigenvalues)
    each = 3 if method == "hutch++" else 2
    draws = 20 if spectrum == "full" else 6
    result = measures.trace(loss, params, num_products=each * draws, method=method)
    np.testing.assert_allclose(result.value, np.trace(matrix), rtol=1e-9, atol=1e-9)


def test_trace_of_a_network_is_exact_at_full_rank():
    params, data = problem.params(), problem.batches()
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    for method, each in (("hutch++", 3), ("xtrace", 2)):
        result = measures.trace(
            problem.loss_fn, params, data, num_products=each * problem.SIZE, method=method
        )
        np.testing.assert_allclose(result.value, np.trace(dense), rtol=1e-8)
