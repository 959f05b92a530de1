"""What cannot be measured is refused in one clear error; NaN is reported, never hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem

PARAMS, DATA = problem.params(dtype=jnp.float32), problem.batches(dtype=jnp.float32)
# Every measure of one network under a loss, as `measure(loss_fn, params, batches)`.
MEASURES = {
    "hessian_vector_product": lambda f, p, b, **k: measures.hessian_vector_product(f, p, p, b, **k),
    "top_eigenvalues": measures.top_eigenvalues,
    "trace": measures.trace,
    "spectral_density": measures.spectral_density,
    "sam_sharpness": measures.sam_sharpness,
    "adaptive_sharpness": measures.adaptive_sharpness,
    "critical_sharpness": measures.critical_sharpness,
    "keskar_sharpness": measures.keskar_sharpness,
    "local_energy": measures.local_energy,
    "local_entropy_estimate": lambda f, p, b, **k: measures.local_entropy_estimate(
        f, p, b, gamma=1.0, **k
    ),
    "pac_bayes_sigma": measures.pac_bayes_sigma,
    "gradient_norm": measures.gradient_norm,
    "quantisation_gap": measures.quantisation_gap,
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


@every_measure
@pytest.mark.parametrize(
    ("loss_fn", "params", "batches", "words"),
    [
        (problem.model_fn, PARAMS, DATA, "one real scalar"),
        (lambda p, b: (problem.loss_fn(p, b), 0), PARAMS, DATA, "one real scalar"),
        (lambda p, b: problem.loss_fn(p, b) / 0.0, PARAMS, DATA, "loss_fn is inf at params"),
        (lambda p, b: problem.loss_fn(p, b) * np.nan, PARAMS, DATA, "loss_fn is nan at params"),
        (problem.loss_fn, PARAMS, jax.tree.map(lambda x: x[:0], DATA), "batches is empty"),
        (problem.loss_fn, PARAMS, (), "batches is empty"),
        (problem.loss_fn, PARAMS, [], "batches is empty"),
        (problem.loss_fn, PARAMS, lambda: iter(()), "batches is empty"),
        (problem.loss_fn, PARAMS, [jax.tree.map(lambda x: x[0, :0], DATA)], "batches is empty"),
        (problem.loss_fn, PARAMS, problem.flat_data(DATA), "fails on one batch"),
        (problem.loss_fn, PARAMS, (DATA[0], DATA[1][:1]), "the same number in all"),
        (problem.loss_fn, PARAMS, iter([1]), "can be read only once"),
        (problem.loss_fn, PARAMS, None, "fails on one batch"),
        (problem.loss_fn, {"first": PARAMS["first"]}, DATA, "fails on one batch"),
        (problem.loss_fn, jax.tree.map(lambda x: x * 1j, PARAMS), DATA, "complex"),
        (problem.loss_fn, jax.tree.map(lambda x: x.astype(int), PARAMS), DATA, "nothing to vary"),
    ],
    ids=[
        "vector loss", "aux", "inf", "nan", "no batches", "no arrays", "empty list",
        "empty iterator", "no examples", "not stacked", "uneven", "generator", "no data",
        "wrong params", "complex", "integers",
    ],
)  # fmt: skip
def test_bad_input(measure, loss_fn, params, batches, words):
    with pytest.raises(ValueError, match=words):
        measure(loss_fn, params, batches)


@every_measure
@pytest.mark.parametrize(
    "mask",
    [{"first": True}, {"first": False, "second": False}, [True, False, True]],
    ids=["partial", "nothing", "list"],
)
def test_bad_mask(measure, mask):
    with pytest.raises(ValueError, match=r"mask|nothing to vary"):
        measure(problem.loss_fn, PARAMS, DATA, mask=mask)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda *a: measures.top_eigenvalues(*a, k=problem.SIZE + 1), "k=52 exceeds"),
        (lambda *a: measures.top_eigenvalues(*a, k=0), "k=0 is out of range"),
        (lambda *a: measures.top_eigenvalues(*a, k=4, num_steps=3), "num_steps=3"),
        (lambda *a: measures.top_eigenvalues(*a, tolerance=-1.0), "tolerance"),
        (lambda *a: measures.top_eigenvalues(*a, which="best"), "which='best'"),
        (lambda *a: measures.top_eigenvalues(*a, output_loss="hinge"), "output_loss='hinge'"),
        (lambda *a: measures.top_eigenvalues(*a, key=jnp.ones(3)), "key="),
        (lambda *a: measures.trace(*a, method="best"), "method='best'"),
        (lambda *a: measures.trace(*a, num_products=2, method="hutch++"), "num_products=2"),
        (lambda *a: measures.trace(*a, num_products=200, method="xtrace"), "num_products=200"),
        (lambda *a: measures.spectral_density(*a, num_probes=52), "num_probes=52 exceeds"),
        (lambda *a: measures.spectral_density(*a, num_steps=52), "num_steps=52 exceeds"),
        (lambda *a: measures.spectral_density(*a, width=0.0), "width=0.0"),
        (lambda *a: measures.spectral_density(*a, grid_size=1), "grid_size=1"),
        (lambda *a: measures.sam_sharpness(*a, rho=-1.0), "rho=-1.0"),
        (lambda *a: measures.sam_sharpness(*a, num_steps=0), "num_steps=0"),
        (lambda *a: measures.adaptive_sharpness(*a, norm="l1"), "norm='l1'"),
        (lambda *a: measures.adaptive_sharpness(*a, case="best"), "case='best'"),
        (lambda *a: measures.keskar_sharpness(*a, epsilon=-1.0), "epsilon"),
        (lambda *a: measures.keskar_sharpness(*a, method="best"), "method='best'"),
        (lambda *a: measures.local_energy(*a, sigmas=[]), "sigmas"),
        (lambda *a: measures.local_energy(*a, sigmas=[-0.1]), "sigmas"),
        (lambda *a: measures.local_energy(*a, num_samples=0), "num_samples=0"),
        (lambda *a: measures.local_entropy_estimate(*a, gamma=0.0), "gamma=0.0"),
        (lambda *a: measures.pac_bayes_sigma(*a, target=0.0), "target=0.0"),
        (lambda *a: measures.pac_bayes_sigma(*a, limits=(1.0, 1.0)), "limits"),
        (lambda *a: measures.quantisation_gap(*a, bits=1), "bits=1"),
        (lambda *a: measures.quantisation_gap(*a, bits=17), "bits=17"),
        (lambda f, p, b: measures.hessian_vector_product(f, p, p["first"], b), "vector has leaves"),
        (
            lambda f, p, b: measures.hessian_vector_product(
                f, p, jax.tree.map(lambda x: x[:1], p), b
            ),
            "vector has leaves",
        ),
        (lambda f, p, b: measures.linear_barrier(f, p, p["first"], b), "other_params has leaves"),
        (lambda f, p, b: measures.linear_barrier(f, p, p, b, num_points=1), "num_points=1"),
        (lambda f, p, b: measures.fisher_trace(problem.model_fn, p, None), "fails on one batch"),
        (
            lambda f, p, b: measures.cka(
                problem.model_fn, p, p, jax.tree.map(lambda x: x[:, :3], b)
            ),
            "at least 4",
        ),
        (lambda f, p, b: measures.chain_units({"a": {"kernel": jnp.ones((2, 2))}}), "two or more"),
        (lambda f, p, b: measures.chain_units(p, ["first", "third"]), "no leaf third/kernel"),
        (lambda f, p, b: measures.chain_units(p, ["second", "first"]), "does not lead to"),
        (
            lambda f, p, b: measures.rescale_units(p, [measures.Units((("first/x", 0),), ())]),
            "names 'first/x'",
        ),
        (
            lambda f, p, b: jax.jit(
                lambda p: measures.align_units(p, p, measures.chain_units(p)).params
            )(p),
            "cannot run under jax.jit",
        ),
        (
            lambda f, p, b: jax.jit(lambda p: measures.keskar_sharpness(f, p, b))(p),
            "cannot run under jax.jit",
        ),
        (lambda f, p, b: measures.barrier_height(jnp.zeros(3), jnp.zeros(4)), "same one axis"),
    ],
)  # fmt: skip
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(problem.loss_fn, PARAMS, DATA)


def test_what_is_no_function_is_a_type_error():
    with pytest.raises(TypeError, match="loss_fn=3 must be callable"):
        measures.trace(3, PARAMS, DATA)


def _root(params, batch):
    """Finite at the parameters, with a second derivative that is not: the root of zero."""
    return problem.loss_fn(params, batch) + jnp.sqrt(jnp.sum(params["first"]["bias"] ** 2))


BROKEN = {**PARAMS, "first": {**PARAMS["first"], "bias": jnp.zeros(problem.H)}}


def test_nan_is_reported():
    result = measures.top_eigenvalues(_root, BROKEN, DATA, k=2)
    assert np.isnan(result.values).all()
    assert not result.converged.any()
    assert result.num_products < 48  # It does not go on with NaN.
    for method in ("hutchinson", "hutch++", "xtrace"):
        trace = measures.trace(_root, BROKEN, DATA, method=method)
        assert np.isnan(trace.value)
        assert np.isnan(trace.standard_error)
    density = measures.spectral_density(_root, BROKEN, DATA, num_probes=2, num_steps=5)
    assert np.isnan(density.density).all()
    assert np.isnan(measures.gradient_norm(_root, BROKEN, DATA))
    assert np.isnan(measures.sam_sharpness(_root, BROKEN, DATA))


def test_nan_is_reported_under_jit_too():
    def nan_loss(params, batch):
        return problem.loss_fn(params, batch) * np.nan

    result = jax.jit(lambda p: measures.top_eigenvalues(nan_loss, p, DATA))(PARAMS)
    assert np.isnan(result.values).all()
    assert not result.converged.any()
    energy = jax.jit(lambda p: measures.local_energy(nan_loss, p, DATA))(PARAMS)
    assert np.isnan(energy.energy).all()
    barrier = jax.jit(lambda p: measures.linear_barrier(nan_loss, p, p, DATA))(PARAMS)
    assert np.isnan(barrier.height)


def test_overflow_in_the_ball_is_reported():
    def loss(w):
        return jnp.log(1.0 - jnp.sum(w**2))

    assert not np.isfinite(measures.sam_sharpness(loss, jnp.array([-0.5, 0.0]), rho=2.0, key=0))
