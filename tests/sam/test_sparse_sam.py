"""Sparse SAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

EVERYWHERE = functools.partial(jax.tree.map, lambda p: True)
RHO = 0.05
SAM = flatopt.sam(RHO)


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.sparse_sam(RHO, mask=EVERYWHERE), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


@pytest.mark.parametrize("mask", [flatopt.mask_by_fisher, flatopt.mask_at_random])
def test_a_mask_of_everything_is_sam(mask):
    stage = flatopt.gradient_at(mask(flatopt.scale_to_norm(RHO), 0.0, every=2))
    cases.assert_close(_train(stage), _train(SAM), rtol=1e-6, atol=1e-7)


def _chosen(displacement):
    return np.concatenate([np.ravel(x != 0) for x in jax.tree.leaves(displacement)])


def test_fisher_mask_takes_the_largest_and_is_renewed():
    perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(1.0), sparsity=0.6, every=2)
    rows = jnp.array([[5.0, 4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 9.0, 8.0], [1.0, 1, 1, 9, 8]])
    state, masks = perturbation.init(rows[0]), []
    for grads in rows:
        displacement, state = perturbation.update(grads, state, rows[0])
        masks.append(_chosen(displacement).tolist())
    first, last = [True, True, False, False, False], [False, False, False, True, True]
    assert masks == [first, first, last]


def test_fisher_of_single_examples_can_be_handed_in():
    perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(1.0), sparsity=0.5, every=1)
    tx = flatopt.gradient_at(perturbation)
    params, seen = jnp.array([1.0, 1.0]), []

    def grad_fn(point, i):
        del i
        seen.append(point)
        return point

    x = jnp.array([[0.0, 3.0], [0.0, -3.0]])  # The mean gradient of the second entry is zero.
    fisher = flatopt.empirical_fisher(lambda w, x: jnp.mean(x @ w), params, x)
    np.testing.assert_allclose(fisher, [0.0, 18.0])
    tx.update(jnp.array([5.0, 1.0]), tx.init(params), params, grad_fn=grad_fn, fisher=fisher)
    assert seen[0][0] == 1.0
    assert seen[0][1] > 1.0
    with pytest.raises(ValueError, match="args is empty"):
        flatopt.empirical_fisher(lambda w: w.sum(), params)


@pytest.mark.parametrize(("decay_steps", "moved_late"), [(None, True), (4, False)])
def test_random_mask_keeps_its_size_and_moves(decay_steps, moved_late):
    perturbation = flatopt.mask_at_random(
        flatopt.scale_to_norm(1.0), sparsity=0.7, every=2, decay_steps=decay_steps, key=3
    )
    grads = {"a": jnp.linspace(1.0, 2.0, 60).reshape(6, 10), "b": jnp.linspace(2.0, 3.0, 40)}
    state, masks = perturbation.init(grads), []
    for _ in range(9):
        displacement, state = perturbation.update(grads, state, grads)
        masks.append(_chosen(displacement))
    assert [m.sum() for m in masks] == [30] * 9
    assert (masks[0] == masks[1]).all()
    kept = (masks[1] & masks[2]).sum()
    assert kept >= 15
    assert not (masks[1] == masks[2]).all()
    # What stays are the live weights with the largest gradients.
    live = np.flatnonzero(masks[1])
    assert set(live[-15:]) <= set(np.flatnonzero(masks[2]))
    assert (masks[7] != masks[8]).any() == moved_late


def test_random_mask_keeps_its_size_where_gradients_are_not_finite():
    perturbation = flatopt.mask_at_random(flatopt.scale_to_norm(1.0), sparsity=0.7, every=1, key=3)
    params = jnp.ones(100)
    state = perturbation.init(params)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        _, state = perturbation.update(params.at[::2].set(bad), state, params)
        assert state.mask.sum() == 30
    _, state = perturbation.update(jnp.full(100, jnp.nan), state, params)
    assert state.mask.sum() == 30


@pytest.mark.parametrize("make", [flatopt.mask_by_fisher, flatopt.mask_at_random])
def test_masks_do_not_hide_a_nan(make):
    perturbation = make(flatopt.scale_to_norm(1.0), sparsity=0.5, every=1)
    params, state = jnp.ones(8), perturbation.init(jnp.ones(8))
    for place in range(8):
        grads = params.at[place].set(jnp.nan)
        displacement, state = perturbation.update(grads, state, params)
        # The first Fisher mask has seen no finite gradient yet, and is that of zeros.
        assert jnp.isnan(displacement).sum() == 4
        _, state = perturbation.update(params, state, params)


@pytest.mark.parametrize(
    "climb",
    [
        flatopt.scale_to_norm,
        flatopt.scale_to_adaptive_norm,
        flatopt.scale_to_weighted_norm,
        lambda rho: flatopt.scale_to_loss_rise(rho, rho),
    ],
)
@pytest.mark.parametrize("make", [flatopt.mask_by_fisher, flatopt.mask_at_random])
def test_masks_do_not_hide_an_inf_that_they_leave_alone(make, climb):
    perturbation, params = make(climb(1.0), sparsity=0.5, every=1), jnp.ones(8)
    for place in range(8):
        grads = params.at[place].set(jnp.inf)
        displacement, _ = perturbation.update(grads, perturbation.init(params), params)
        assert not jnp.isfinite(displacement).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_fixed_mask_does_not_hide_what_is_not_finite(place, bad):
    """The second gradient is finite here wherever the point is, so only the point can tell."""
    stage = flatopt.sparse_sam(RHO, jnp.array([True, False]))
    w = jnp.array([3.0, 4.0])
    updates, _ = stage.update(w.at[place].set(bad), stage.init(w), w, grad_fn=lambda w, i: w)
    assert not jnp.isfinite(updates).all()


def test_no_schedule_of_the_guard():
    with pytest.raises(TypeError, match=r"epsilon=.* A schedule is not taken here"):
        flatopt.sparse_sam(RHO, True, epsilon=optax.constant_schedule(1e-7))


@pytest.mark.parametrize("make", [flatopt.mask_by_fisher, flatopt.mask_at_random])
def test_arguments_that_could_not_work_are_refused(make):
    schedule = optax.constant_schedule(0.5)
    with pytest.raises(TypeError, match=r"sparsity=.* A schedule is not taken here"):
        make(flatopt.scale_to_norm(1.0), schedule, every=1)
    with pytest.raises(TypeError, match=r"perturbation=0\.05 must be an optax transformation"):
        make(0.05, 0.5, every=1)


@replays("ssam")
def test_replays_ssam(golden: Golden) -> None:
    mask = {name: jnp.asarray(m, bool) for name, m in golden.tree("mask").items()}
    stage = flatopt.sparse_sam(golden.hyper["rho"], mask, epsilon=1e-7)
    tx = optax.chain(stage, torch_optimizer(golden.hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))
