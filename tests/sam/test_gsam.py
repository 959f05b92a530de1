"""GSAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, table, torch_optimizer

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.gsam(RHO, alpha=0.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_gsam_leaves_the_perturbed_loss_to_the_perturbed_gradient():
    """What it adds is orthogonal to the gradient whose loss it must not change."""
    perturbed, clean = jnp.array([2.0, 1.0, 0.5]), jnp.array([1.0, -1.0, 3.0])
    for minimise_perturbed, kept in ((True, perturbed), (False, clean)):
        combiner = flatopt.surrogate_gap(0.7, minimise_perturbed=minimise_perturbed)
        mixed, _ = combiner.update(perturbed, combiner.init(clean), clean_updates=clean)
        np.testing.assert_allclose(jnp.vdot(mixed - kept, kept), 0.0, atol=1e-6)
        assert jnp.linalg.norm(mixed - kept) > 0.1


@pytest.mark.parametrize("minimise_perturbed", [True, False])
@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
def test_the_projection_knows_gradients_of_every_size(size, minimise_perturbed):
    """The squares of their entries leave the range of float32, or fall below the guard."""
    combiner = flatopt.surrogate_gap(0.7, minimise_perturbed=minimise_perturbed)

    def mixed(size):
        p, c = size * jnp.array([2.0, 1.0, 0.5]), size * jnp.array([1.0, -1.0, 3.0])
        return combiner.update(p, combiner.init(c), clean_updates=c)[0] / size

    np.testing.assert_allclose(mixed(size), mixed(1.0), rtol=1e-5)


def test_proportional_rho_is_never_negative():
    """A warm-up that starts below the lowest rate would make the formula negative."""
    learning_rate = optax.linear_schedule(0.0, 0.1, 10)
    rho = flatopt.proportional_rho_schedule(learning_rate, 0.5, 0.1, 0.1, 0.09)
    values = jax.vmap(rho)(jnp.arange(11))
    assert values[0] == 0.0
    np.testing.assert_allclose(values[-1], 0.5, rtol=1e-6)
    assert flatopt.proportional_rho_schedule(learning_rate, 0.5, 0.1, 0.1, 0.1)(3) == 0.5


@pytest.mark.parametrize("position", range(4))
def test_the_bounds_of_the_proportional_radius_are_numbers(position):
    learning_rate = optax.linear_schedule(0.1, 0.0, 10)
    bounds = [0.6, 0.1, 0.1, 0.0]
    bounds[position] = learning_rate
    with pytest.raises(TypeError, match="A schedule is not taken here"):
        flatopt.proportional_rho_schedule(learning_rate, *bounds)


def test_the_perturbation_is_a_transformation():
    with pytest.raises(TypeError, match=r"perturbation=0\.1 must be an optax transformation"):
        flatopt.gsam(RHO, perturbation=0.1)


@replays("gsam")
def test_replays(golden: Golden) -> None:
    """The official PyTorch loop leaves radius and learning rate a step apart: both are recorded."""
    hyper = golden.hyper
    rho = table(golden.arrays["rho_t"])
    perturbation = flatopt.scale_to_adaptive_norm(rho) if hyper["adaptive"] else None
    stage = flatopt.gsam(rho, hyper["alpha"], perturbation=perturbation)
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))


@replays("gsam_bigvision")
def test_replays_gsam_bigvision(golden: Golden) -> None:
    """`gsam/` is the gradient that the optimiser gets; without momentum its trace is the last."""
    hyper = golden.hyper
    learning_rate = table(hyper["lr_list"])
    bounds = (hyper["rho_max"], hyper["rho_min"], hyper["lr_max"], hyper["lr_min"])
    rho = flatopt.proportional_rho_schedule(learning_rate, *bounds)
    stage = flatopt.gsam(
        rho,
        hyper["alpha"],
        perturbation=flatopt.scale_to_weighted_norm(rho) if hyper["adaptive"] else None,
        minimise_perturbed=hyper["minimize_fp"],
    )
    tx = optax.chain(stage, torch_optimizer(hyper, learning_rate))
    buffers = {"gsam": lambda s: optax.tree.get(s, "trace")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))
