"""ASAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests import cases
from tests.replay import Golden, assert_sam_agrees, replays, torch_optimizer


@replays("asam_samsung")
def test_replays_asam_samsung(golden: Golden) -> None:
    """Only tensors that are called "weight" are measured in units of themselves."""
    hyper = golden.hyper
    if hyper["minimizer"] == "ASAM":
        mask = {name: "weight" in name for name in golden.tree("p0")}
        stage = flatopt.asam(hyper["rho"], eta=hyper["eta"], mask=mask)
    else:
        stage = flatopt.sam(hyper["rho"])
    base = torch_optimizer(hyper, golden.learning_rate)
    assert_sam_agrees(golden, optax.chain(stage, base))


def test_without_adaptation_it_is_sam():
    """T is 1 everywhere where the mask says so."""
    nowhere = jax.tree.map(lambda _: False, cases.init_params())
    asam, sam = (
        cases.run(optax.chain(stage, cases.sgd()))[0]
        for stage in (flatopt.asam(0.05, mask=nowhere), flatopt.sam(0.05))
    )
    cases.assert_close(asam, sam)


def test_the_ascent_does_not_depend_on_the_scale_of_the_weights():
    """Weights ten times as large, gradients a tenth: a displacement ten times as long."""
    perturbation = flatopt.scale_to_adaptive_norm(0.5)
    w, grads = jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 1.0, -1.0])
    small, _ = perturbation.update(grads, perturbation.init(w), w)
    large, _ = perturbation.update(grads / 10, perturbation.init(w), 10 * w)
    np.testing.assert_allclose(large, 10 * small, rtol=1e-5)
