"""Critical sharpness in closed form, and beside the top eigenvalue of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


HESSIAN = np.diag([1.0, 3.0, 10.0])


def _quadratic(params, *_):
    return 0.5 * params["w"] @ jnp.asarray(HESSIAN) @ params["w"]


@pytest.mark.parametrize("start", [1e-4, 0.1, 1.0, 300.0])
def test_along_the_top_eigenvector_it_is_the_top_eigenvalue(start: float):
    params = {"w": jnp.array([0.0, 0.0, 2.0])}
    value = measures.critical_sharpness(_quadratic, params, learning_rate=start, tolerance=1e-9)
    (top,) = measures.top_eigenvalues(_quadratic, params, k=1).values
    np.testing.assert_allclose(value, 10.0, rtol=1e-8)
    np.testing.assert_allclose(value, top, rtol=1e-6)


def test_of_a_quadratic_it_is_the_quotient_of_the_direction():
    w, d = np.array([3.0, -1.0, 0.5]), np.array([1.0, -1.0, 0.4])
    g = HESSIAN @ w
    params = {"w": jnp.asarray(w)}
    value = measures.critical_sharpness(_quadratic, params, tolerance=1e-9)
    np.testing.assert_allclose(value, g @ HESSIAN @ g / (g @ g), rtol=1e-8)
    assert value < 10.0
    value = measures.critical_sharpness(
        _quadratic, params, direction={"w": jnp.asarray(d)}, tolerance=1e-9
    )
    np.testing.assert_allclose(value, d @ HESSIAN @ d / (d @ g), rtol=1e-8)


@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_the_tolerance_bounds_the_error_from_below(tolerance: float):
    """The last interval's upper end is the step: too long, by the tolerance at most."""
    params = {"w": jnp.array([0.0, 0.0, 2.0])}
    value = measures.critical_sharpness(_quadratic, params, tolerance=tolerance)
    assert 10.0 * (1 - tolerance) <= value <= 10.0


def test_of_a_network_it_is_the_quotient_of_its_gradient_and_below_the_top_eigenvalue():
    params, data = problem.params(), problem.batches()

    def loss_fn(p, batch):
        return problem.loss_fn(p, batch) + 0.01 * optax.tree.norm(p, squared=True)

    gradient = jax.grad(lambda p: loss_fn(p, problem.flat_data(data)))
    descend = lambda _, p: jax.tree.map(lambda w, g: w - 0.5 * g, p, gradient(p))  # noqa: E731
    gaps = []
    for steps in (0, 3000):
        trained = jax.lax.fori_loop(0, steps, descend, params)
        hessian = problem.dense_hessian(loss_fn, trained, data)
        g = np.asarray(ravel_pytree(gradient(trained))[0])
        value = measures.critical_sharpness(loss_fn, trained, data)
        assert 0 < value < np.linalg.eigvalsh(hessian)[-1]
        gaps.append(abs(value / (g @ hessian @ g / (g @ g)) - 1))
    # The step to where the loss rises is in proportion to the gradient: at the end of training the
    # loss is a quadratic so far, at its beginning it is not.
    assert gaps[1] < 0.05 < gaps[0], gaps


def test_how_the_data_come_does_not_matter():
    params, data = problem.params(), problem.batches()
    arguments = {"tolerance": 1e-6}
    stacked = measures.critical_sharpness(problem.loss_fn, params, data, **arguments)
    listed = [jax.tree.map(lambda x, i=i: x[i], data) for i in range(problem.N)]
    looped = measures.critical_sharpness(problem.loss_fn, params, listed, **arguments)
    np.testing.assert_allclose(looped, stacked, rtol=1e-5)
    jitted = jax.jit(lambda p: measures.critical_sharpness(problem.loss_fn, p, data, **arguments))
    np.testing.assert_allclose(jitted(params), stacked, rtol=1e-5)
    weighted = measures.critical_sharpness(
        problem.loss_fn, params, data, weights=[1.0, 0.0, 0.0], **arguments
    )
    first = measures.critical_sharpness(problem.loss_fn, params, listed[:1], **arguments)
    np.testing.assert_allclose(weighted, first, rtol=1e-5)


@pytest.mark.parametrize("with_direction", [True, False])
def test_it_takes_forward_passes_and_a_gradient_only_where_no_direction_is_given(with_direction):
    calls = []

    @jax.custom_jvp
    def traced(w):
        jax.debug.callback(lambda _: calls.append("forward"), w[0])
        return w

    @traced.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda _: calls.append("gradient"), primals[0][0])
        return primals[0], tangents[0]

    def loss_fn(params, *_):
        return _quadratic({"w": traced(params["w"])})

    params = {"w": jnp.array([0.0, 0.0, 2.0])}
    direction = {"w": jnp.array([0.0, 0.0, 20.0])} if with_direction else None
    measures.critical_sharpness(loss_fn, params, direction=direction)
    jax.effects_barrier()
    assert calls.count("gradient") == (not with_direction)
    # One to check the loss, one at the parameters; steps of 1, 1/2, 1/4, and 1/8, which lowers the
    # loss. The critical step is 0.2: an interval of 1/8 is halved ten times to be 0.0002 wide.
    assert calls.count("forward") == 2 + 4 + 10


def test_its_limits():
    params = {"w": jnp.array([1.0, 1.0, 1.0])}
    linear = lambda p, *_: jnp.sum(p["w"])  # noqa: E731
    assert measures.critical_sharpness(linear, params) == 0.0
    assert measures.critical_sharpness(_quadratic, {"w": jnp.zeros(3)}) == 0.0
    uphill = {"w": -jnp.asarray(HESSIAN) @ params["w"]}
    assert measures.critical_sharpness(_quadratic, params, direction=uphill) > 1e12
    nan = jax.jit(lambda p: measures.critical_sharpness(lambda p: jnp.nan * p["w"][0], p))
    assert jnp.isnan(nan(params))
    # A loss that is not a number has risen.
    log = lambda p, *_: -jnp.log(p["w"][0])  # noqa: E731
    walled = {"w": jnp.array([-1.0, 0.0, 0.0])}
    grown = measures.critical_sharpness(lambda p: -log({"w": p["w"]}), params)
    assert np.isfinite(grown)
    assert measures.critical_sharpness(log, params, direction=walled) == 0.0


def test_wrong_arguments():
    params = {"w": jnp.ones(3)}
    for name, bad in (("learning_rate", 0.0), ("tolerance", 0.0), ("tolerance", 1.0)):
        with pytest.raises(ValueError, match=f"{name}={bad}"):
            measures.critical_sharpness(_quadratic, params, **{name: bad})
    with pytest.raises(ValueError, match="direction has leaves of shapes"):
        measures.critical_sharpness(_quadratic, params, direction={"w": jnp.ones(2)})
