"""How alike two networks are, by hand."""

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


def test_cka_is_the_unbiased_estimate_by_hand():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()

    def hsic(k, m):  # As in its definition, with the diagonals removed.
        n = len(k)
        k, m = (x - np.diag(np.diag(x)) for x in (k, m))
        one = np.ones(n)
        both = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (both - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    sums = np.zeros(3)
    for i in range(problem.N):
        batch = jax.tree.map(lambda x, i=i: x[i], data)
        k, m = (np.asarray(f @ f.T) for f in (problem.model_fn(p, batch) for p in (first, second)))
        sums += [hsic(k, m), hsic(k, k), hsic(m, m)]
    value = measures.cka(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, sums[0] / np.sqrt(sums[1] * sums[2]), rtol=1e-9)
    np.testing.assert_allclose(measures.cka(problem.model_fn, first, first, data), 1, rtol=1e-9)


def test_cka_of_unrelated_features_is_about_zero_for_small_batches():
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(400, 6, 20)))

    halves = {"w": jnp.zeros(1)}
    value = measures.cka(
        lambda p, x: x[:, :10] + p["w"][None],
        halves,
        halves,
        data,
        other_features_fn=lambda p, x: x[:, 10:] + p["w"][None],
    )
    assert abs(value) < 0.05


def test_prediction_disagreement():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    whole = problem.flat_data(data)
    votes = [jnp.argmax(problem.model_fn(p, whole), axis=1) for p in (first, second)]
    value = measures.prediction_disagreement(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, np.mean(votes[0] != votes[1]))
    assert measures.prediction_disagreement(problem.model_fn, first, first, data) == 0
    broken = jax.tree.map(lambda x: x * jnp.nan, first)
    assert np.isnan(measures.prediction_disagreement(problem.model_fn, first, broken, data))
