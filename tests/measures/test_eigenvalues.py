"""Eigenvalues against exact dense Hessians, and what all spectral measures owe, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


@pytest.mark.parametrize("unit", [1e25, 1e19, 1.0, 1e-19, 1e-25])
def test_losses_in_small_and_large_units(unit):
    diagonal = jnp.array([5.0, 3.0, 1.0, 0.5, -2.0], jnp.float32)

    def loss(w):
        return 0.5 * unit * jnp.sum(diagonal * w**2)

    w = jnp.zeros(5, jnp.float32)
    result = measures.top_eigenvalues(loss, w, k=2)
    np.testing.assert_allclose(result.values / unit, [5, 3], rtol=1e-5)
    assert result.converged.all()
    for method, num_products in (("hutch++", 15), ("xtrace", 10)):
        trace = measures.trace(loss, w, method=method, num_products=num_products).value
        np.testing.assert_allclose(trace / unit, 7.5, rtol=1e-4)
    density = measures.spectral_density(loss, w, num_probes=5)
    moment = jnp.mean(jnp.sum(density.weights * density.nodes, axis=1))
    np.testing.assert_allclose(moment / unit, 1.5, rtol=1e-5)


def test_a_tree_without_entries_is_said_to_have_none():
    for measure in (measures.spectral_density, measures.top_eigenvalues, measures.trace):
        with pytest.raises(ValueError, match="nothing to vary"):
            measure(lambda w: jnp.sum(w), jnp.zeros((0, 3)))
