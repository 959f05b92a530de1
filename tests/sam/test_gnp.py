"""Gradient-norm penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.gnp(RHO, alpha=1.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_it_is_the_gradient_of_the_penalised_loss():
    """Up to first order in rho: the gradient of L + alpha rho |gradient of L|."""
    alpha, rho = 0.7, 1e-3
    curvature, w = jnp.array([1.0, 4.0]), jnp.array([3.0, 1.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(curvature * w**2))
    stage = flatopt.gnp(rho, alpha)
    updates, _ = stage.update(grad_fn(w), stage.init(w), w, grad_fn=grad_fn)
    penalty = jax.grad(lambda w: jnp.linalg.norm(curvature * w))(w)
    np.testing.assert_allclose(updates - grad_fn(w), alpha * rho * penalty, rtol=2e-3)


@replays("gnp")
def test_replays(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.gnp(hyper["r"], hyper["alpha"], normalise_clean=hyper["norm_perturbations"])
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))
