"""Unified SAM."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05


def test_at_lambda_one_it_is_sam():
    method, _ = cases.run(optax.chain(flatopt.unified_sam(RHO, 1.0), cases.sgd()))
    sam, _ = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_at_lambda_zero_it_climbs_by_the_raw_gradient():
    method, _ = cases.run(optax.chain(flatopt.unified_sam(RHO, 0.0), cases.sgd()))
    raw = flatopt.gradient_at(optax.scale(RHO))
    cases.assert_close(method, cases.run(optax.chain(raw, cases.sgd()))[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_a_gradient_of_length_one_moves_by_rho_whatever_lambda(lam: float):
    grads = {"a": jnp.array([0.6]), "b": jnp.array([0.0, -0.8])}
    perturbation = flatopt.scale_by_partial_norm(RHO, lam)
    displacement, _ = perturbation.update(grads, perturbation.init(grads))
    np.testing.assert_allclose(optax.tree.norm(displacement), RHO, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_an_inf_is_not_hidden(lam: float):
    grads = jnp.array([1.0, jnp.inf])
    perturbation = flatopt.scale_by_partial_norm(RHO, lam)
    displacement, _ = perturbation.update(grads, perturbation.init(grads))
    assert jnp.isnan(displacement).all()


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lambda_is_a_share(lam: float):
    with pytest.raises(ValueError, match=r"lam=.* out of range"):
        flatopt.unified_sam(RHO, lam)


@replays("unified_sam")
def test_replays(golden: Golden) -> None:
    """The named schedules count steps from 1."""
    hyper = golden.hyper
    inverse = lambda step: 1 / (jnp.asarray(step, float) + 1)  # noqa: E731
    named = {"1/t": inverse, "1-1/t": lambda step: 1 - inverse(step)}
    lam = named.get(hyper["lambd"], hyper["lambd"])
    stage = flatopt.unified_sam(hyper["rho"], lam)
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))
