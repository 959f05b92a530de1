"""Fisher SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.05


def _displaced(grads, eta, rho=RHO):
    perturbation = flatopt.scale_to_fisher_norm(rho, eta)
    return perturbation.update(grads, perturbation.init(grads))[0]


def test_without_eta_it_is_sam():
    method, _ = cases.run(optax.chain(flatopt.fisher_sam(RHO, 0.0), cases.sgd()))
    sam, _ = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_it_is_the_steepest_of_the_displacements_of_that_length_in_the_metric():
    """The longest product with the gradient on the ellipsoid, which none of many others exceeds."""
    grads, eta = jnp.array([1.0, -2.0, 0.1, 0.0]), 3.0
    fisher = 1 + eta * grads**2
    displacement = _displaced(grads, eta)
    np.testing.assert_allclose(displacement @ (fisher * displacement), RHO**2, rtol=1e-5)
    others = jax.random.normal(jax.random.key(0), (1000, 4))
    others *= RHO / jnp.sqrt(jnp.sum(fisher[None] * others**2, axis=1, keepdims=True))
    assert (others @ grads).max() <= displacement @ grads
    assert (others @ grads).max() > 0.9 * (displacement @ grads)


@pytest.mark.parametrize("size", [1e-8, 1e25])
def test_gradients_of_every_size(size: float):
    """A small gradient is SAM's; a large one moves every weight as far as the gradient is small."""
    grads = size * jnp.array([1.0, -2.0])
    displacement = _displaced(grads, 1.0)
    assert jnp.isfinite(displacement).all()
    if size < 1:
        np.testing.assert_allclose(displacement, RHO * grads / jnp.linalg.norm(grads), rtol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_what_is_not_finite_shows(bad, eta: float):
    assert jnp.isnan(_displaced({"a": jnp.array([1.0, bad]), "b": jnp.ones(2)}, eta)["a"]).all()


def test_eta_is_not_negative():
    with pytest.raises(ValueError, match=r"eta=-1.* out of range"):
        flatopt.fisher_sam(RHO, -1.0)
