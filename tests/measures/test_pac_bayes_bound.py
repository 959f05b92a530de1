"""PAC-Bayes bounds of Gaussians, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def _bound(sigma=0.1, params=None, prior=None, **kwargs):
    params = problem.params() if params is None else params
    prior = problem.params(1) if prior is None else prior
    defaults = {"num_examples": 24, "num_samples": 16} | kwargs
    return measures.pac_bayes_bound(
        problem.error_fn, params, prior, problem.batches(), sigma=sigma, **defaults
    )


def _difference(first, second):
    return [
        np.asarray(x - y).ravel()
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    ]


def test_a_bound_by_hand():
    result = _bound(num_examples=2400, delta=0.1, sample_delta=0.02)
    square = sum(x @ x for x in _difference(problem.params(), problem.params(1)))
    np.testing.assert_allclose(result.kl, square / (2 * 0.1**2))
    sample = measures.kl_inverse(result.stochastic_error, np.log(2 / 0.02) / 16)
    np.testing.assert_allclose(result.sample_bound, sample)
    expected = measures.seeger_bound(result.sample_bound, result.kl, 2400, 0.1)
    np.testing.assert_allclose(result.bound, expected)
    np.testing.assert_allclose(
        result.error, problem.error_fn(problem.params(), problem.flat_data(problem.batches()))
    )
    assert result.sigma == result.prior_sigma == 0.1


def test_of_a_grid_the_best_size_is_taken_and_paid_for():
    sizes = [0.01, 0.1, 1.0]
    near = jax.tree.map(lambda w: w + 0.01, problem.params())
    settings = {"prior": near, "num_examples": 2400}
    result = _bound(sizes, **settings)
    alone = [_bound(s, delta=0.05 / 3, sample_delta=0.01 / 3, **settings) for s in sizes]
    best = min(alone, key=lambda r: r.bound)
    np.testing.assert_allclose(result, best)
    assert _bound(float(best.sigma), **settings).bound < result.bound < 1


def test_layers_have_sizes_of_their_own():
    scale = {"first": 2.0, "second": 0.5}
    result = _bound(scale=scale)
    sizes = [0.2, 0.2, 0.05, 0.05]
    shifts = _difference(problem.params(), problem.params(1))
    expected = sum(x @ x / (2 * s**2) for x, s in zip(shifts, sizes, strict=True))
    np.testing.assert_allclose(result.kl, expected)
    # And so have weights: the same sizes, said one by one.
    full = {k: jax.tree.map(lambda w, s=s: jnp.full(w.shape, s), problem.params()[k])
            for k, s in scale.items()}  # fmt: skip
    np.testing.assert_allclose(_bound(scale=full), result)


def test_a_prior_of_another_variance():
    grid = measures.PriorGrid(jnp.array([0.05, 0.3, 2.0]), jnp.array([0.5, 0.3, 0.2]))
    scale = {"first": 1.0, "second": 3.0}
    result = _bound(scale=scale, grid=grid, num_examples=2400)
    shifts = _difference(problem.params(), problem.params(1))
    sizes = [0.1, 0.1, 0.3, 0.3]

    def kl(prior_sigma):
        ratios = [(s / prior_sigma) ** 2 for s in sizes]
        terms = [
            x @ x / prior_sigma**2 + len(x) * (r - 1 - np.log(r))
            for x, r in zip(shifts, ratios, strict=True)
        ]
        return sum(terms) / 2

    bounds = [
        measures.seeger_bound(result.sample_bound, kl(s) - np.log(p), 2400)
        for s, p in zip(grid.sigmas, grid.weights, strict=True)
    ]
    best = int(np.argmin(bounds))
    np.testing.assert_allclose(result.bound, bounds[best])
    np.testing.assert_allclose(result.kl, kl(grid.sigmas[best]))
    assert result.prior_sigma == grid.sigmas[best]


def test_the_noise_is_that_of_local_energy():
    """The same draws: in units of the weights for the energy, of the scale for the bound."""
    params, data = problem.params(), problem.batches()
    energy = measures.local_energy(problem.error_fn, params, data, sigmas=[0.5], num_samples=16)
    result = _bound(0.5, prior=params, scale=params)
    np.testing.assert_allclose(result.stochastic_error, energy.energy[0] + energy.error)
    np.testing.assert_allclose(result.standard_error, energy.standard_error[0], rtol=1e-9)


def test_the_prior_itself_costs_nothing_but_the_logarithm():
    grid = measures.PriorGrid(jnp.array([0.1]), jnp.array([1.0]))
    params = problem.params()
    for result in (_bound(prior=params), _bound(prior=params, grid=grid)):
        np.testing.assert_allclose(result.kl, 0, atol=1e-12)
        np.testing.assert_allclose(
            result.bound, measures.seeger_bound(result.sample_bound, 0.0, 24), rtol=1e-9
        )


def test_kl_to_isotropic_is_never_negative_and_exact_in_float32():
    with jax.enable_x64(False):
        zeros = jnp.zeros(100_000)
        shift = zeros.at[0].set(0.01)
        grid = measures.PriorGrid(jnp.array([0.1]), jnp.array([1.0]))
        for params, expected in ((zeros, 0.0), (shift, 0.5 * 0.01)):
            result = measures.pac_bayes_bound(
                lambda w: jnp.mean(w > 1.0), params, zeros, num_examples=10, sigma=0.1, grid=grid,
                num_samples=2,
            )  # fmt: skip
            assert result.kl >= 0
            np.testing.assert_allclose(result.kl, expected, atol=0.02)


def test_what_does_not_vary_must_be_the_priors():
    mask = {"first": True, "second": False}
    params, prior = problem.params(), problem.params(1)
    assert _bound(mask=mask, num_examples=10**6).bound == 1
    settings = {"mask": mask, "num_examples": 10**6}
    assert _bound(prior=prior | {"second": params["second"]}, **settings).bound < 1


def test_batches_one_by_one_and_compiled_give_the_same():
    whole = [problem.flat_data(problem.batches())]
    listed = measures.pac_bayes_bound(
        problem.error_fn, problem.params(), problem.params(1), whole, sigma=[0.1, 0.3],
        num_examples=24, num_samples=16, grid=measures.prior_grid(),
    )  # fmt: skip
    stacked = _bound([0.1, 0.3], grid=measures.prior_grid())
    np.testing.assert_allclose(listed, stacked, rtol=1e-9)
    jitted = jax.jit(lambda p: _bound([0.1, 0.3], params=p, grid=measures.prior_grid()))
    np.testing.assert_allclose(jitted(problem.params()), stacked, rtol=1e-9)


def test_an_error_outside_of_0_and_1_is_refused_and_shows_as_nan():
    def loss(p, batch):
        return 2 + problem.error_fn(p, batch)

    def bound(params):
        return measures.pac_bayes_bound(
            loss, params, problem.params(1), problem.batches(), sigma=0.1, num_examples=24,
            num_samples=2,
        ).bound  # fmt: skip

    with pytest.raises(ValueError, match=r"error_fn is 2.* at params: it must lie in \[0, 1\]"):
        bound(problem.params())
    assert np.isnan(jax.jit(bound)(problem.params()))


def test_bad_arguments_are_refused():
    for kwargs, message in (
        ({"sigma": 0.0}, "sigma=.* is out of range"),
        ({"sigma": np.ones((2, 2))}, "must be a number or a sequence"),
        ({"delta": 0.0}, "delta=0.0 is out of range"),
        ({"sample_delta": 2.0}, "sample_delta=2.0 is out of range"),
        ({"num_examples": 0}, "num_examples=0 is out of range"),
        ({"scale": {"first": jnp.ones(3), "second": 1.0}}, r"scale has an entry of shape \(3,\)"),
        ({"prior": {"first": 1.0}}, "prior has leaves of shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            _bound(**kwargs)


def test_the_weights_of_the_prior_grid_are_a_share_of_one():
    grid = measures.prior_grid(c=0.2, b=50.0, number=2000)
    np.testing.assert_allclose(np.asarray(grid.sigmas)[[0, 49]] ** 2, 0.2 * np.exp([-1 / 50, -1]))
    assert 0.999 < grid.weights.sum() < 1


def test_it_holds_as_often_as_it_says():
    """Many data sets, one posterior for each: the bound fails on no more than its share."""
    probability, number = 0.15, 100
    errors = np.random.default_rng(0).binomial(number, probability, size=300) / number

    def bound(error):
        w = jnp.zeros(1)
        return measures.pac_bayes_bound(
            lambda w: error + 0 * w[0], w, w, num_examples=number, sigma=1.0, num_samples=4,
            delta=0.1, sample_delta=0.1,
        ).bound  # fmt: skip

    found = jax.vmap(bound)(jnp.asarray(errors))
    assert np.mean(found < probability) <= 0.2
    assert found.min() < 1
