"""Eigenvalues, traces and densities against exact dense Hessians, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatopt import measures
from tests import measures_problem as problem


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


# Products


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


# Eigenvalues


@pytest.mark.parametrize("form", ["stacked", "uneven"])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_all_eigenvalues_to_eight_digits(which, form):
    params, data = problem.params(), problem.batches()
    dense = np.linalg.eigvalsh(problem.dense_hessian(problem.loss_fn, params, data))
    order = {"largest": -dense, "smallest": dense, "magnitude": -abs(dense)}[which]
    k = 10 if form == "stacked" else 3
    result = measures.top_eigenvalues(
        problem.loss_fn,
        params,
        FORMS[form](data),
        k=k,
        tolerance=1e-9,
        num_steps=problem.SIZE,
        which=which,
    )
    np.testing.assert_allclose(result.values, dense[np.argsort(order)][:k], rtol=1e-8)
    assert result.converged.all()
    assert result.num_products <= problem.SIZE


def test_eigenvectors_and_residuals():
    params, data = problem.params(), problem.batches()
    result = measures.top_eigenvalues(problem.loss_fn, params, data, k=4, num_steps=12)
    flat = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(result.vectors))
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-12)
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    true = np.linalg.norm(dense @ flat.T - flat.T * np.asarray(result.values)[None], axis=0)
    # What the process says of itself is true, converged or not.
    np.testing.assert_allclose(result.residuals, true, rtol=1e-6, atol=1e-12)
    assert result.num_products == 12
    np.testing.assert_array_equal(result.converged, true <= 1e-3 * result.values[0])
    assert not result.converged.all()
    assert not measures.top_eigenvalues(
        problem.loss_fn, params, data, k=1, num_steps=2, tolerance=1e-8
    ).converged.any()


def test_it_stops_when_converged():
    params, data = problem.params(), problem.batches()
    loose = measures.top_eigenvalues(problem.loss_fn, params, data, k=1, tolerance=0.1)
    tight = measures.top_eigenvalues(problem.loss_fn, params, data, k=1, tolerance=1e-6)
    assert loose.num_products < tight.num_products < 44


@pytest.mark.parametrize(
    "spectrum",
    [
        np.full(12, 3.0),
        np.r_[np.full(4, 5.0), np.full(8, 1.0)],
        np.r_[9.0, np.zeros(11)],
        np.zeros(12),
        np.r_[-np.ones(6), np.ones(6)],
        1e-20 * np.arange(1.0, 13),
        1e12 * np.arange(1.0, 13),
    ],
    ids=["multiple", "two values", "rank one", "zero", "indefinite", "tiny", "huge"],
)
def test_multiple_zero_and_extreme_eigenvalues(spectrum):
    loss, _, params = problem.quadratic(spectrum)
    result = measures.top_eigenvalues(loss, params, k=12, num_steps=12, tolerance=0.0)
    scale = max(abs(spectrum).max(), 1e-30)
    np.testing.assert_allclose(result.values / scale, np.sort(spectrum)[::-1] / scale, atol=1e-9)
    assert result.converged.all()


def test_mask():
    params, data = problem.params(), problem.batches()
    mask = {"first": False, "second": {"kernel": True, "bias": False}}
    result = measures.top_eigenvalues(problem.loss_fn, params, data, k=3, tolerance=1e-9, mask=mask)
    dense = problem.dense_hessian(problem.loss_fn, params, data)
    marks = ravel_pytree(
        jax.tree.map(
            lambda m, p: jax.tree.map(lambda x: jnp.full(x.shape, float(m)), p), mask, params
        )
    )[0].astype(bool)
    expected = np.linalg.eigvalsh(dense[np.ix_(marks, marks)])[::-1][:3]
    np.testing.assert_allclose(result.values, expected, rtol=1e-8)
    assert not result.vectors["first"]["kernel"].any()
    assert not result.vectors["second"]["bias"].any()
    by_function = measures.top_eigenvalues(
        problem.loss_fn,
        params,
        data,
        k=3,
        tolerance=1e-9,
        mask=lambda p: (
            mask | {"second": {"kernel": p["second"]["kernel"].ndim == 2, "bias": False}}
        ),
    )
    np.testing.assert_array_equal(result.values, by_function.values)


# Trace


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


# Density


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


# Composition


def test_under_jit_and_vmap():
    data = problem.batches()
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[problem.params(s) for s in range(3)])

    def value(params):
        return measures.top_eigenvalues(problem.loss_fn, params, data, k=2).values

    def total(params):
        return measures.trace(problem.loss_fn, params, data, method="xtrace").value

    for function in (value, total):
        one_by_one = [function(problem.params(s)) for s in range(3)]
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(stack), one_by_one, rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(axis_type):
    rng = np.random.default_rng(0)
    data = problem.batches()
    params = {"kernel": jnp.asarray(rng.normal(size=(problem.D, 8))), "bias": jnp.ones(8)}
    mesh = jax.make_mesh((4,), ("units",), axis_types=(axis_type,))

    def sharding(leaf):
        spec = PartitionSpec(None, "units") if leaf.ndim == 2 else PartitionSpec("units")
        return NamedSharding(mesh, spec)

    sharded = jax.device_put(params, jax.tree.map(sharding, params))

    def loss(p, batch):
        hidden = jnp.tanh(batch[0] @ p["kernel"] + p["bias"][None])
        return jnp.mean(jnp.sum(hidden**4, axis=1))

    def measure_all(p):
        return (
            measures.top_eigenvalues(loss, p, data, k=2, num_steps=6).values,
            measures.trace(loss, p, data, num_products=6).value,
            measures.trace(loss, p, data, num_products=6, method="xtrace").value,
            measures.sam_sharpness(loss, p, data, num_steps=3, key=0),
            measures.adaptive_sharpness(loss, p, data, case="average", norm="linf").value,
            measures.local_energy(loss, p, data, num_samples=2).energy,
        )

    with jax.set_mesh(mesh):
        found = measure_all(sharded)
        vectors = measures.top_eigenvalues(loss, sharded, data, num_steps=6).vectors
    for one, two in zip(found, measure_all(params), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9)
    # Nothing was gathered on the way: the eigenvectors are spread out as the parameters are.
    assert not vectors["kernel"].sharding.is_fully_replicated


def test_half_precision_is_measured_in_single():
    single = problem.params(dtype=jnp.bfloat16)
    data = problem.batches(dtype=jnp.float32)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), single)
    found = measures.top_eigenvalues(problem.loss_fn, single, data)
    assert found.values.dtype == jnp.float32
    np.testing.assert_allclose(
        found.values, measures.top_eigenvalues(problem.loss_fn, upcast, data).values, rtol=1e-5
    )


def test_equal_calls_share_one_compiled_program():
    params, data = problem.params(), problem.batches()
    traces = []

    def loss(p, batch):
        traces.append(None)
        return problem.loss_fn(p, batch)

    measures.top_eigenvalues(loss, params, data, k=2)
    before = len(traces)
    measures.top_eigenvalues(loss, problem.params(5), data, k=2)
    assert len(traces) <= before + 1  # The shapes of the loss are looked at; nothing is compiled.


@pytest.mark.parametrize("measure", ["top_eigenvalues", "trace", "spectral_density"])
def test_memory_does_not_grow_with_the_number_of_batches(measure):
    def memory(number):
        data = jax.eval_shape(lambda: problem.batches(number=number))
        function = jax.jit(lambda p, d: getattr(measures, measure)(problem.loss_fn, p, d))
        analysis = function.lower(problem.params(), data).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    few, many = memory(4), memory(400)
    assert few > 0
    assert many <= 1.02 * few
