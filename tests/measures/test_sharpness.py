"""Sharpness against closed forms, on quadratics and on a network."""

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


SPECTRUM = np.r_[7.0, 3.0, 1.0, 0.5, np.zeros(5)]


BOWL, MATRIX, MINIMUM = problem.quadratic(SPECTRUM)


def _separable(params, batch=None):
    """A quadratic without coupling, on every leaf; the mean over batches has curvature 2, 4, 6."""
    del batch
    return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * params["w"] ** 2)


@pytest.mark.parametrize("rho", [1e-3, 0.1])
def test_sharpness_at_a_minimum_is_half_rho_squared_lambda(rho):
    value = measures.sam_sharpness(BOWL, MINIMUM, rho=rho, num_steps=60, key=0)
    np.testing.assert_allclose(value, 0.5 * rho**2 * SPECTRUM.max(), rtol=1e-9)


def test_sharpness_of_a_network_at_its_minimum():
    # A teacher's own outputs as targets: the loss is zero at its weights.
    params, data = problem.params(), problem.batches()
    data = (data[0], jax.vmap(lambda x, y: problem.model_fn(params, (x, y)))(*data))

    def loss(p, batch):
        return 0.5 * jnp.mean(jnp.sum((problem.model_fn(p, batch) - batch[1]) ** 2, axis=1))

    largest = np.linalg.eigvalsh(problem.dense_hessian(loss, params, data))[-1]
    value = measures.sam_sharpness(loss, params, data, rho=1e-4, num_steps=80, key=1)
    np.testing.assert_allclose(value, 0.5e-8 * largest, rtol=1e-3)


def test_one_step_is_the_step_of_sam():
    params, data = problem.params(), problem.batches()
    whole = problem.flat_data(data)
    loss, grads = jax.value_and_grad(problem.loss_fn)(params, whole)
    norm = np.linalg.norm(ravel_pytree(grads)[0])
    moved = jax.tree.map(lambda w, g: w + 0.3 * g / norm, params, grads)
    expected = problem.loss_fn(moved, whole) - loss
    value = measures.sam_sharpness(problem.loss_fn, params, data, rho=0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    by_list = measures.sam_sharpness(problem.loss_fn, params, [whole], rho=0.3)
    np.testing.assert_allclose(by_list, expected, rtol=1e-9)
    # m-sharpness: each batch has a displacement of its own.
    each = [
        measures.sam_sharpness(
            problem.loss_fn, params, [jax.tree.map(lambda x, i=i: x[i], data)], rho=0.3
        )
        for i in range(problem.N)
    ]
    own = measures.sam_sharpness(problem.loss_fn, params, data, rho=0.3, per_batch=True)
    np.testing.assert_allclose(own, np.mean(each), rtol=1e-9)
    assert own > value
    assert measures.sam_sharpness(problem.loss_fn, params, data, rho=0.3, num_steps=5) >= value


def test_mask_keeps_the_other_leaves_where_they_are():
    mask = {"a": True, "b": False}
    value = measures.sam_sharpness(BOWL, MINIMUM, rho=0.1, num_steps=80, key=0, mask=mask)
    largest = np.linalg.eigvalsh(MATRIX[:3, :3])[-1]
    np.testing.assert_allclose(value, 0.005 * largest, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_adaptive_sharpness_in_closed_form(eta):
    w = np.array([1.0, -2.0, 3.0])
    params, curvature = {"w": jnp.asarray(w)}, np.array([2.0, 4.0, 6.0])
    unit = abs(w) + eta
    cube = measures.adaptive_sharpness(_separable, params, rho=0.1, norm="linf", eta=eta)
    expected = np.sum(curvature * abs(w) * 0.1 * unit) + 0.005 * np.sum(curvature * unit**2)
    np.testing.assert_allclose(cube.value, expected, rtol=1e-10)
    assert cube.standard_error == 0
    # At the minimum 0 every weight moves by eta; the ball's worst direction is the stiffest one.
    ball = measures.adaptive_sharpness(
        _separable, {"w": jnp.zeros(3)}, rho=0.1, eta=1.0, num_steps=60, key=0
    )
    np.testing.assert_allclose(ball.value, 0.005 * 6.0, rtol=1e-9)
    for norm, variance in (("l2", 1.0), ("linf", 1 / 3)):
        mean = measures.adaptive_sharpness(
            _separable, params, rho=0.1, norm=norm, case="average", eta=eta, num_samples=4000
        )
        closed = 0.005 * variance * np.sum(curvature * unit**2)
        assert abs(mean.value - closed) < 4 * mean.standard_error


def test_adaptive_sharpness_does_not_see_rescalings():
    params, data = problem.params(), problem.batches()

    def loss(p, batch):
        hidden = jax.nn.relu(batch[0] @ p["first"]["kernel"])
        outputs = hidden @ p["second"]["kernel"]
        return jnp.mean((outputs - jax.nn.one_hot(batch[1], problem.C)) ** 2)

    scaled = {
        "first": {**params["first"], "kernel": 10 * params["first"]["kernel"]},
        "second": {**params["second"], "kernel": params["second"]["kernel"] / 10},
    }
    adaptive, plain = (
        [
            float(getattr(f(loss, p, data, rho=0.01), "value", f(loss, p, data, rho=0.01)))
            for p in (params, scaled)
        ]
        for f in (measures.adaptive_sharpness, measures.sam_sharpness)
    )
    np.testing.assert_allclose(*adaptive, rtol=1e-6)
    assert plain[1] > 2 * plain[0]


@pytest.mark.parametrize("measure", ["sam_sharpness", "adaptive_sharpness", "gradient_norm"])
def test_memory_does_not_grow_with_the_number_of_batches(measure):
    def memory(number):
        data = jax.eval_shape(lambda: problem.batches(number=number))
        function = jax.jit(lambda p, d: getattr(measures, measure)(problem.loss_fn, p, d))
        compiled = function.lower(problem.params(), data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < memory(400) <= 1.02 * memory(4)
