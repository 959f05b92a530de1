"""Gossip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._replicas.gossip import mix_all, mix_one
from tests import cases
from tests.replay import Golden, assert_agrees, replay_replicas, replays, torch_optimizer
from tests.replicas.layouts import (
    NUMBER,
    TOPOLOGIES,
    make_batches,
    make_replicas,
    sgd,
    train_leading,
)


# Mixing
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 8, 9, 12, 16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_mixing_matrices_are_doubly_stochastic(topology: str, number: int):
    matrix = flatopt.mixing_matrix(topology, number)
    assert (matrix >= 0).all()
    assert (np.diag(matrix) > 0).all()
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    if topology != "exponential":
        np.testing.assert_array_equal(matrix, matrix.T)
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(matrix)))
    if number > 1:
        assert eigenvalues[-2] < 1 - 1e-9  # Connected: mixing again and again gives the mean.


def test_mixing_matrices_have_the_right_neighbours():
    assert (flatopt.mixing_matrix("ring", 6)[0] > 0).nonzero()[0].tolist() == [0, 1, 5]
    assert (flatopt.mixing_matrix("exponential", 8)[0] > 0).nonzero()[0].tolist() == [0, 1, 2, 4]
    # A grid of three by four: 0 1 2 3 / 4 5 6 7 / 8 9 10 11.
    assert (flatopt.mixing_matrix("torus", 12)[5] > 0).nonzero()[0].tolist() == [1, 4, 5, 6, 9]
    np.testing.assert_allclose(flatopt.mixing_matrix("full", 4), 0.25)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gossip_keeps_the_centre_and_reaches_consensus(topology: str):
    params = make_replicas()
    tx = flatopt.gossip(optax.sgd(0.1), topology)
    zeros, state = optax.tree.zeros_like(params), tx.init(params)
    mixed = params
    for _ in range(40):
        updates, state = tx.update(zeros, state, mixed)
        mixed = optax.apply_updates(mixed, updates)
    centre = flatopt.barycentre(params)
    cases.assert_close(flatopt.barycentre(mixed), centre)
    spread = max(float(jnp.abs(x - x[:1]).max()) for x in jax.tree.leaves(mixed))
    assert spread < 0.05


def test_full_gossip_with_the_same_gradients_is_centralised_sgd():
    start = flatopt.replicate_params(cases.init_params(), NUMBER)
    params = train_leading(flatopt.gossip(optax.sgd(0.1), "full"), start)
    # Mixing comes first: after the last step the replicas differ by that step alone.
    centre, expected = flatopt.barycentre(params), cases.init_params()
    for i in range(1):
        grads = jax.vmap(jax.grad(cases.loss_fn), (None, 0))(expected, make_batches(i))
        expected = optax.tree.add_scale(expected, -0.1, jax.tree.map(lambda g: g.mean(0), grads))
    one_step = flatopt.barycentre(train_leading(flatopt.gossip(optax.sgd(0.1), "full"), start, 1))
    cases.assert_close(one_step, expected)
    assert cases.loss_fn(centre, cases.make_batch()) < cases.loss_fn(
        cases.init_params(), cases.make_batch()
    )


@pytest.mark.parametrize(
    ("mixing", "words"),
    [
        ("star", "must be one of ring"),
        (np.ones([2, 3]), "square"),
        (np.array([[0.5, 0.5], [0.9, 0.1]]), "doubly stochastic"),
        (np.array([[1.5, -0.5], [-0.5, 1.5]]), "without negatives"),
    ],
)
def test_unfit_mixing(mixing, words: str):
    with pytest.raises(ValueError, match=words):
        flatopt.gossip(sgd(), mixing)


def test_matrix_of_another_size():
    params = make_replicas(3)
    tx = flatopt.gossip(sgd(), np.full([2, 2], 0.5))
    with pytest.raises(ValueError, match="there are 3 replicas"):
        tx.update(params, tx.init(params), params)


@replays("dpsgd")
def test_replays_dpsgd(golden: Golden) -> None:
    """Mixing with the recorded matrix, which a topology of flatopt's must make too."""
    hyper, matrix = golden.hyper, golden.arrays["W"]
    if hyper["topology"] in ("ring", "exponential"):
        own = flatopt.mixing_matrix(hyper["topology"], int(hyper["n"]))
        np.testing.assert_allclose(own, matrix, rtol=1e-6)  # It is in float32 there.
    tx = flatopt.gossip(torch_optimizer(hyper, golden.learning_rate), matrix)
    assert_agrees(golden.results, replay_replicas(golden, tx), ignore=("W",))  # An input.


@pytest.mark.parametrize("axis", [None, "replicas"])
def test_matrix_of_another_size_on_either_axis(axis):
    tx, params = flatopt.gossip(sgd(), np.full([2, 2], 0.5), axis_name=axis), jnp.ones([3, 1])
    update = lambda p: tx.update(p, tx.init(p), p)  # noqa: E731
    with pytest.raises(ValueError, match="there are 3 replicas"):
        (update if axis is None else jax.vmap(update, axis_name=axis))(params)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_mixing_one_by_one_is_the_product_with_the_matrix(topology: str):
    params = jax.random.normal(jax.random.key(0), (6, 3))
    expected = flatopt.mixing_matrix(topology, 6) @ np.asarray(params, np.float64)
    one = lambda w: mix_one(w, topology, "replicas")  # noqa: E731
    np.testing.assert_allclose(mix_all(params, topology), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(one, axis_name="replicas")(params), expected, rtol=1e-5)


def test_a_matrix_of_lists_is_one_of_numpy():
    params, matrix = jnp.array([[1.0], [4.0]]), [[0.75, 0.25], [0.25, 0.75]]
    run = lambda tx: tx.update(params, tx.init(params), params)[0]  # noqa: E731
    cases.assert_equal(
        run(flatopt.gossip(sgd(), matrix)), run(flatopt.gossip(sgd(), np.array(matrix)))
    )
