"""LookSAM, and `reuse_direction` under it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.looksam(RHO, every=1, alpha=0.5), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


def test_it_is_reuse_direction_of_an_ascent():
    stage = flatopt.reuse_direction(flatopt.scale_to_norm(RHO), every=3, alpha=0.5)
    looksam = flatopt.looksam(RHO, every=3, alpha=0.5)
    cases.assert_equal(_train(stage), _train(looksam))


@pytest.mark.parametrize("layerwise", [False, True])
def test_looksam_reuses_what_the_sharp_gradient_added(layerwise):
    stage = flatopt.looksam(0.5, every=2, alpha=0.3, layerwise=layerwise)
    params, grad_fn = cases.init_params(), flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    clean = grad_fn(params)
    _, state = stage.update(clean, stage.init(params), params, grad_fn=grad_fn)
    updates, _ = stage.update(clean, state, params, grad_fn=grad_fn)
    added = jax.tree.map(jnp.subtract, updates, clean)
    parts = zip(jax.tree.leaves(added), jax.tree.leaves(clean), strict=True)
    pairs = list(parts) if layerwise else [(added, clean)]
    for extra, gradient in pairs:
        if jnp.size(jax.tree.leaves(extra)[0]) > 1:  # A scalar has no orthogonal direction.
            size = 0.3 * optax.tree.norm(gradient)
            np.testing.assert_allclose(optax.tree.norm(extra), size, rtol=1e-4)
            np.testing.assert_allclose(optax.tree.vdot(extra, gradient), 0.0, atol=1e-3 * size)


def test_looksam_has_no_direction_for_a_single_parameter():
    """The two gradients are parallel: what rounding leaves must not be blown up to length 1."""
    stage = flatopt.looksam(0.1, every=2, alpha=0.5)
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.cosh(1.7 * w))
    w = jnp.array(0.3)
    _, state = stage.update(grad_fn(w), stage.init(w), w, grad_fn=grad_fn)
    updates, _ = stage.update(grad_fn(w), state, w, grad_fn=grad_fn)
    np.testing.assert_array_equal(updates, grad_fn(w))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
def test_the_direction_does_not_depend_on_the_size_of_the_gradients(size, layerwise):
    """The squares of their entries leave the range of float32."""
    clean = {"a": jnp.array([1.0, 2.0, -1.0]), "b": jnp.array([0.5, 3.0])}
    sharp = {"a": jnp.array([2.0, -1.0, 0.5]), "b": jnp.array([1.0, 1.0])}

    def reused(size):
        c, p = (optax.tree.scale(size, tree) for tree in (clean, sharp))
        stage = flatopt.reuse_direction(flatopt.scale_to_norm(RHO), every=2, layerwise=layerwise)
        state = stage.init(clean)
        for _ in range(2):
            updates, state = stage.update(c, state, clean, grad_fn=lambda w, i: p)
        return state.direction, optax.tree.scale(1 / size, updates)

    cases.assert_close(reused(size), reused(1.0), rtol=1e-5)


@pytest.mark.parametrize("bad", ["clean", "sharp"])
def test_a_gradient_that_is_not_finite_leaves_the_direction_alone(bad):
    stage = flatopt.reuse_direction(flatopt.scale_to_norm(RHO), every=1)
    w = jnp.array([3.0, 4.0])
    _, state = stage.update(w, stage.init(w), w, grad_fn=lambda w, i: w[::-1])
    good, poison = jnp.array([1.0, 2.0]), jnp.array([1.0, jnp.inf])
    clean, sharp = (poison, good) if bad == "clean" else (good, poison)
    _, after = stage.update(clean, state, w, grad_fn=lambda w, i: sharp)
    cases.assert_equal(after.direction, state.direction)
    assert np.isfinite(state.direction).all()


def test_a_leaf_without_a_gradient_has_no_direction():
    """All of its sharp gradient would be orthogonal to nothing."""
    stage = flatopt.reuse_direction(flatopt.scale_to_norm(RHO), every=2, layerwise=True)
    clean, sharp = [jnp.zeros(2), jnp.array([1.0, 2.0])], [jnp.ones(2), jnp.ones(2)]
    _, state = stage.update(clean, stage.init(clean), clean, grad_fn=lambda w, i: sharp)
    np.testing.assert_array_equal(state.direction[0], 0.0)
    np.testing.assert_allclose(optax.tree.norm(state.direction[1]), 1.0, rtol=1e-6)


@replays("looksam")
def test_replays(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.looksam(hyper["rho"], every=hyper["k"], alpha=hyper["alpha"])
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    buffers = {"v_unit": lambda s: optax.tree.get(s, "direction")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))
