"""Monitoring stages record what they say, and change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.measures import problem

DATA = problem.flat_data(problem.batches(dtype=jnp.float32))
GRAD_FN = flatopt.make_grad_fn(problem.loss_fn, DATA)


def _run(tx, steps=4):
    params = problem.params(dtype=jnp.float32)
    opt_state = tx.init(params)
    history = []

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(GRAD_FN(params), opt_state, params, grad_fn=GRAD_FN)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        before = (params, opt_state)
        params, opt_state = step(params, opt_state)
        history.append((*before, params, opt_state))
    return history


def _assert_same_path(tx, plain):
    for (*_, a, _), (*_, b, _) in zip(_run(tx), _run(plain), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_gradient_norm():
    tx = optax.chain(flatopt.record_gradient_norm(), optax.sgd(0.1))
    for params, _, _, opt_state in _run(tx):
        expected = optax.tree.norm(GRAD_FN(params))
        np.testing.assert_allclose(optax.tree.get(opt_state, "gradient_norm"), expected, rtol=1e-5)
    _assert_same_path(tx, optax.sgd(0.1))


def test_distance_from_the_average():
    tx = optax.chain(optax.sgd(0.5), flatopt.record_distance(flatopt.swa(start=2)))
    distances = []
    for _, _, params, opt_state in _run(tx):
        average = flatopt.eval_params(opt_state, params)
        expected = optax.tree.norm(jax.tree.map(jnp.subtract, params, average))
        distances.append(float(optax.tree.get(opt_state, "distance")))
        np.testing.assert_allclose(distances[-1], expected, rtol=1e-5, atol=1e-6)
    assert distances[0] == 0
    assert distances[-1] > 1e-3


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(optax.sgd(0.1, momentum=0.9), "trace"), (optax.adam(0.01), "mu")],
    ids=["sgd", "adam"],
)
def test_cosine_of_gradient_and_momentum(optimizer, name):
    tx = flatopt.record_cosine(optimizer)
    for number, (params, old_state, _, opt_state) in enumerate(_run(tx)):
        cosine = optax.tree.get(opt_state, "cosine")
        if number == 0:
            assert cosine == 0  # No momentum yet.
            continue
        momentum, grads = optax.tree.get(old_state, name), GRAD_FN(params)
        product = optax.tree.vdot(momentum, grads)
        expected = product / (optax.tree.norm(momentum) * optax.tree.norm(grads))
        np.testing.assert_allclose(cosine, expected, rtol=1e-4)
    _assert_same_path(tx, optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.sgd(0.1), "record_cosine found no momentum"),
        (optax.chain(optax.trace(0.9), optax.trace(0.5)), "record_cosine found 2 momentum buffers"),
    ],
    ids=["none", "two"],
)
def test_cosine_needs_one_momentum(optimizer, message):
    with pytest.raises(ValueError, match=message):
        flatopt.record_cosine(optimizer).init(jnp.ones(2))
