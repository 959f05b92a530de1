"""Sharpness, noise, Fisher, quantisation: closed forms on quadratics and small networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flatopt import measures
from tests import measures_problem as problem


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


# Sharpness


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


@pytest.mark.parametrize("method", ["l-bfgs-b", "projected"])
def test_keskar_sharpness_in_closed_form(method):
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    value = measures.keskar_sharpness(_separable, params, epsilon=0.1, method=method, num_steps=30)
    w = np.array([1.0, 2.0, 3.0])
    loss, highest = (np.sum(w * x**2) for x in (w, w + 0.1 * (w + 1)))
    np.testing.assert_allclose(value, 100 * (highest - loss) / (1 + loss), rtol=1e-6)


def test_both_ways_to_keskar_agree_on_a_network():
    params, data = problem.params(), problem.batches()
    arguments = (problem.loss_fn, params, data)
    scipy = measures.keskar_sharpness(*arguments, epsilon=1e-3, num_steps=50)
    projected = measures.keskar_sharpness(
        *arguments, epsilon=1e-3, num_steps=50, method="projected"
    )
    assert scipy > 0
    np.testing.assert_allclose(projected, scipy, rtol=1e-3)


# Noise


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


def test_pac_bayes_sigma_of_a_quadratic():
    loss, matrix, params = problem.quadratic(np.linspace(1, 3, 300))
    result = measures.pac_bayes_sigma(loss, params, target=0.1, num_samples=64)
    np.testing.assert_allclose(result.sigma, np.sqrt(0.2 / np.trace(matrix)), rtol=0.03)
    np.testing.assert_allclose(result.rise, 0.1, rtol=1e-4)
    at_limit = measures.pac_bayes_sigma(loss, params, target=1e9, limits=(1e-3, 1e-2))
    np.testing.assert_allclose(at_limit.sigma, 1e-2, rtol=1e-4)


def test_local_entropy_of_a_quadratic():
    result = measures.local_entropy_estimate(BOWL, MINIMUM, gamma=4.0, beta=2.0, num_samples=20000)
    exact = -0.5 * np.sum(np.log1p(2.0 * SPECTRUM / 4.0))
    assert abs(result.value - exact) < 4 * result.standard_error
    assert 100 < result.effective_samples < 20000


# First derivatives


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


# Quantisation


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_weights_lie_on_the_grid(bits, per_channel):
    params = problem.params()
    rounded = measures.quantise(params, bits, per_channel=per_channel)
    for name, layer in params.items():
        np.testing.assert_array_equal(layer["bias"], rounded[name]["bias"])
        kernel = np.asarray(layer["kernel"])
        axis = 0 if per_channel else None
        step = abs(kernel).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
        levels = rounded[name]["kernel"] / step
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)
        assert (abs(rounded[name]["kernel"] - kernel) <= step / 2 + 1e-12).all()


def test_quantisation_gap():
    params, data = problem.params(), problem.batches()
    whole = problem.flat_data(data)
    for bits in (4, 8):
        expected = problem.loss_fn(measures.quantise(params, bits), whole) - problem.loss_fn(
            params, whole
        )
        gap = measures.quantisation_gap(problem.loss_fn, params, data, bits=bits)
        np.testing.assert_allclose(gap, expected, rtol=1e-9)
    assert measures.quantise({"w": jnp.zeros((2, 2))})["w"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("measure", ["sam_sharpness", "adaptive_sharpness", "gradient_norm"])
def test_memory_does_not_grow_with_the_number_of_batches(measure):
    def memory(number):
        data = jax.eval_shape(lambda: problem.batches(number=number))
        function = jax.jit(lambda p, d: getattr(measures, measure)(problem.loss_fn, p, d))
        compiled = function.lower(problem.params(), data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < memory(400) <= 1.02 * memory(4)
