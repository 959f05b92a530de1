"""Products with the Hessian and the Gauss-Newton matrix against exact dense ones, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

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


@pytest.mark.parametrize("form", FORMS)
def test_hessian_vector_product_is_the_dense_one(form):
    params, data = problem.params(), problem.batches()
    vector = problem.params(7)
    product = measures.hessian_vector_product(problem.loss_fn, params, vector, FORMS[form](data))
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    np.testing.assert_allclose(
        ravel_pytree(product)[0], dense @ ravel_pytree(vector)[0], rtol=1e-10, atol=1e-13
    )


def _mean_cross_entropy(outputs, batch):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], axis=1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["softmax_cross_entropy", "squared_error", "callable"])
def test_gauss_newton_vector_product_is_the_dense_one(kind, form):
    params, data = problem.params(), problem.batches()
    vector = problem.params(7)
    product = measures.gauss_newton_vector_product(
        problem.model_fn,
        params,
        vector,
        FORMS[form](data),
        output_loss=_mean_cross_entropy if kind == "callable" else kind,
    )
    closed = "softmax_cross_entropy" if kind == "callable" else kind
    dense = problem.dense_gauss_newton(params, data, closed)
    np.testing.assert_allclose(
        ravel_pytree(product)[0], dense @ ravel_pytree(vector)[0], rtol=1e-10, atol=1e-13
    )


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(problem.D, problem.C)))}
    data = problem.batches()

    def model(p, batch):
        return batch[0] @ p["kernel"]

    def loss(p, batch):
        return _mean_cross_entropy(model(p, batch), batch)

    hessian = measures.hessian_vector_product(loss, params, params, data)
    gauss_newton = measures.gauss_newton_vector_product(model, params, params, data)
    np.testing.assert_allclose(hessian["kernel"], gauss_newton["kernel"], rtol=1e-10, atol=1e-14)


def test_sketches_need_fewer_products():
    loss, matrix, params = problem.quadratic(100.0 * 0.5 ** np.arange(60))
    errors = {
        method: np.mean(
            [
                abs(measures.trace(loss, params, method=method, key=i).value - np.trace(matrix))
                for i in range(5)
            ]
        )
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert errors["xtrace"] < errors["hutch++"] < 0.1 * errors["hutchinson"]
