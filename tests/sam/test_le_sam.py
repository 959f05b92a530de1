"""LE-SAM."""

import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests import cases

RHO = 0.05
SAM = flatopt.sam(RHO)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


def test_le_sam_is_sam_when_the_budget_is_no_limit():
    cases.assert_close(_train(flatopt.le_sam(budget=1e6, max_rho=RHO)), _train(SAM))


def test_le_sam_raises_the_linearised_loss_by_its_budget():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}
    perturbation = flatopt.scale_to_loss_rise(budget=0.25, max_rho=10.0)
    displacement, _ = perturbation.update(grads, perturbation.init(grads))
    np.testing.assert_allclose(optax.tree.vdot(grads, displacement), 0.25, rtol=1e-6)
