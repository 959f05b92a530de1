"""The inverse relative entropy, its derivatives, and Seeger's bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def _kl(q, p):
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def test_it_inverts_the_relative_entropy():
    q, p = np.meshgrid([1e-4, 0.01, 0.3, 0.9], [0.0101, 0.31, 0.95, 0.99999], indexing="ij")
    q, p = q[p > q], p[p > q]
    np.testing.assert_allclose(measures.kl_inverse(q, _kl(q, p)), p, rtol=1e-12)


def test_without_errors_it_is_a_closed_form():
    c = np.array([1e-12, 1e-3, 1.0, 30.0])
    np.testing.assert_allclose(measures.kl_inverse(0.0, c), -np.expm1(-c), rtol=1e-12)


def test_it_lies_below_pinskers_bound_and_comes_near_it_for_small_c():
    c = np.array([1e-8, 1e-4, 0.1, 1.0])
    value, pinsker = measures.kl_inverse(0.5, c), 0.5 + np.sqrt(c / 2)
    assert (value <= pinsker).all()
    np.testing.assert_allclose(value[:2], pinsker[:2], rtol=1e-4)


def test_its_ends():
    assert measures.kl_inverse(0.2, 0.0) == 0.2
    assert measures.kl_inverse(1.0, 0.3) == 1
    assert measures.kl_inverse(0.2, 1e6) == 1
    assert measures.kl_inverse(jnp.float32(0.1), jnp.float32(0.1)).dtype == jnp.float32
    assert measures.kl_inverse(jnp.bfloat16(0.1), jnp.bfloat16(0.1)).dtype == jnp.float32


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_what_is_no_mean_is_refused_and_shows_as_nan_when_traced(q):
    with pytest.raises(ValueError, match=r"q=.* must be a finite number in \[0, 1\]"):
        measures.kl_inverse(q, 0.1)
    assert np.isnan(jax.jit(measures.kl_inverse)(q, 0.1))
    assert np.isnan(jax.jit(measures.kl_inverse)(0.1, -1.0))


@pytest.mark.parametrize(("q", "c"), [(0.1, 0.05), (0.4, 1e-4), (0.01, 2.0)])
def test_its_derivatives_are_those_of_the_inverse_function(q, c):
    found = jax.grad(measures.kl_inverse, (0, 1))(q, c)
    step = 1e-7 * np.array([q, c])
    inverse = measures.kl_inverse
    by_q = (inverse(q + step[0], c) - inverse(q - step[0], c)) / (2 * step[0])
    by_c = (inverse(q, c + step[1]) - inverse(q, c - step[1])) / (2 * step[1])
    np.testing.assert_allclose(found, [by_q, by_c], rtol=1e-6)


def test_its_derivatives_at_the_ends_are_no_nan():
    for q, c, expected in ((0.2, 0.0, (1.0, np.inf)), (0.2, 1e6, (0, 0)), (1.0, 0.1, (0, 0))):
        np.testing.assert_array_equal(jax.grad(measures.kl_inverse, (0, 1))(q, c), expected)


def test_seegers_bound_by_hand():
    value = measures.seeger_bound(0.05, kl=20.0, m=500, delta=0.1)
    excess = (20 + np.log(2 * np.sqrt(500) / 0.1)) / 500
    np.testing.assert_allclose(_kl(0.05, float(value)), excess, rtol=1e-12)
    with pytest.raises(ValueError, match=r"delta=0\.0 is out of range"):
        measures.seeger_bound(0.05, 20.0, 500, 0.0)
    with pytest.raises(ValueError, match=r"kl=-1\.0 is out of range"):
        measures.seeger_bound(0.05, -1.0, 500)


def test_seegers_bound_holds_as_often_as_it_says():
    """Coins of one unknown bias, and a posterior that is the prior: it fails no more than delta."""
    rng = np.random.default_rng(0)
    observed = rng.binomial(200, 0.1, size=20_000) / 200
    failures = np.mean(np.asarray(measures.seeger_bound(observed, 0.0, 200, 0.2)) < 0.1)
    assert failures <= 0.2
