"""A posterior that is trained on its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt import measures
from tests.measures import problem

M = 2400


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_the_objective_is_pinskers_form_of_the_bound():
    params, prior = problem.params(), problem.params(1)
    grid = measures.prior_grid()
    logs = jax.tree.map(lambda w: jnp.full(w.shape, jnp.log(0.1)), params)
    posterior = measures.GaussianPosterior(params, logs)
    objective = measures.pac_bayes_objective(lambda w: jnp.zeros([]), prior, num_examples=M)
    value = objective(posterior, jax.random.key(0))
    result = measures.pac_bayes_bound(
        problem.error_fn, params, prior, problem.batches(), num_examples=M, sigma=0.1, grid=grid,
        num_samples=2,
    )  # fmt: skip
    (share,) = grid.weights[grid.sigmas == result.prior_sigma]
    excess = (result.kl + np.log(2 * np.sqrt(M) / (0.05 * share))) / M
    np.testing.assert_allclose(value, np.sqrt(excess / 2), rtol=1e-9)


def test_the_mean_of_the_objective_is_that_of_the_noisy_loss():
    """A quadratic under Gaussian noise has the expectation tr(H sigma^2) / 2 above its bottom."""
    curvature = jnp.array([1.0, 2.0, 3.0])
    posterior = measures.GaussianPosterior(jnp.zeros(3), jnp.log(jnp.array([0.5, 0.2, 0.1])))
    objective = measures.pac_bayes_objective(
        lambda w: jnp.sum(curvature * w**2) / 2, jnp.zeros(3), num_examples=M
    )
    flat = measures.pac_bayes_objective(lambda w: 0.0 * w[0], jnp.zeros(3), num_examples=M)
    keys = jax.random.split(jax.random.key(0), 20_000)
    values = jax.vmap(lambda k: objective(posterior, k) - flat(posterior, k))(keys)
    expected = jnp.sum(curvature * posterior.sigma**2) / 2
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - expected) < 4 * error


def _train(optimizer, steps=300):
    x, _ = problem.flat_data(problem.batches(number=40))
    whole = (x, jnp.argmax(x[:, : problem.C], axis=1))

    def loss(p, batch):
        return problem.loss_fn(p, batch) / jnp.log(2.0)

    prior = problem.params()
    return prior, whole, measures.pac_bayes_optimise(
        loss, prior, prior, optimizer, [whole] * steps, num_examples=len(x), sigma=0.03
    )  # fmt: skip


def test_optimising_lowers_the_bound():
    prior, whole, posterior = _train(optax.adam(0.01))

    def bound(params, scale):
        return measures.pac_bayes_bound(
            problem.error_fn, params, prior, [whole], num_examples=len(whole[0]), sigma=1.0,
            scale=scale, grid=measures.prior_grid(), num_samples=64,
        )  # fmt: skip

    before, after = bound(prior, 0.03), bound(posterior.mean, posterior.sigma)
    assert after.bound < 0.9 * before.bound < 0.9
    sizes = jnp.concatenate([s.ravel() for s in jax.tree.leaves(posterior.sigma)])
    assert sizes.std() > 1e-3  # Each weight has its own.


def test_sam_gets_its_gradients():
    _, _, plain = _train(optax.sgd(0.01), steps=3)
    _, _, sharp = _train(optax.chain(flatopt.sam(0.05), optax.sgd(0.01)), steps=3)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), plain, sharp)
    assert all(0 < x < 0.01 for x in jax.tree.leaves(moved))


def test_the_gradient_at_the_prior_is_no_nan():
    w = jnp.zeros(3)
    objective = measures.pac_bayes_objective(lambda w: w @ w, w, num_examples=M)
    posterior = measures.GaussianPosterior(w, jnp.zeros(3))
    gradient = jax.grad(objective)(posterior, jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_half_precision_weights_keep_their_dtype():
    w = jnp.zeros(3, jnp.bfloat16)
    posterior = measures.pac_bayes_optimise(
        lambda w, batch: jnp.sum(w.astype(jnp.float32) ** 2), w, w, optax.sgd(0.1), [None] * 2,
        num_examples=M, sigma=0.1,
    )  # fmt: skip
    assert posterior.mean.dtype == jnp.bfloat16
    assert np.isfinite(posterior.sigma).all()


def test_bad_arguments_are_refused():
    w = jnp.zeros(3)

    def call(**kwargs):
        defaults = {"prior": w, "optimizer": optax.sgd(0.1), "num_examples": M, "batches": []}
        return measures.pac_bayes_optimise(lambda w, b: w @ w, w, **(defaults | kwargs))

    for kwargs, error, message in (
        ({"sigma": 0.0}, ValueError, "sigma=0.0 is out of range"),
        ({"sigma": jnp.ones(2)}, ValueError, "sigma has an entry of shape"),
        ({"prior": jnp.zeros(2)}, ValueError, "prior has leaves of shapes"),
        ({"num_examples": 0}, ValueError, "num_examples=0 is out of range"),
        ({"delta": 0.0}, ValueError, "delta=0.0 is out of range"),
        ({"optimizer": 0.1}, TypeError, "must be an optax transformation"),
    ):
        with pytest.raises(error, match=message):
            call(**kwargs)
