"""Curves: coefficients, control points, what stays fixed, training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import comb

import flatopt
from flatopt import curves, measures
from tests import measures_problem as problem


@pytest.mark.parametrize("num_bends", [2, 3, 6])
def test_coefficients(num_bends):
    for t in np.linspace(0, 1, 7):
        n, j = num_bends - 1, np.arange(num_bends)
        bernstein = comb(n, j) * t**j * (1 - t) ** (n - j)
        np.testing.assert_allclose(curves.bezier(t, num_bends), bernstein, atol=1e-6)
        hats = np.maximum(0, 1 - abs(t * n - j))
        np.testing.assert_allclose(curves.polychain(t, num_bends), hats, atol=1e-6)


def test_control_points_lie_on_the_lines():
    solutions = [problem.params(s, jnp.float32) for s in range(3)]
    controls = curves.control_points(solutions, num_bends=5)
    for number, j in enumerate(curves.fixed_points(3, 5)):
        for a, b in zip(jax.tree.leaves(controls), jax.tree.leaves(solutions[number]), strict=True):
            np.testing.assert_allclose(a[j], b, atol=1e-6)
    kernels = controls["first"]["kernel"]
    np.testing.assert_allclose(kernels[1], (kernels[0] + kernels[2]) / 2, atol=1e-6)
    # A chain passes through every solution; a straight line of three points is the line.
    middle = curves.point(controls, 0.5, curves.polychain)
    np.testing.assert_allclose(middle["first"]["kernel"], kernels[2], atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1, weight_decay=0.5),
        optax.chain(flatopt.sam(0.1), optax.sgd(0.1, momentum=0.9)),
        flatopt.msam(optax.sgd(0.1, momentum=0.9), 0.3),
    ],
    ids=["adamw", "sam", "msam"],
)
def test_ends_stay_where_they_are(optimizer):
    ends = [problem.params(s, jnp.float32) for s in range(2)]
    x, y = problem.batches(dtype=jnp.float32)
    controls = curves.control_points(ends, num_bends=4)
    trained = curves.train(
        problem.loss_fn, controls, optimizer, list(zip(x, y, strict=True)), weight_decay=0.01
    )
    for before, after in zip(jax.tree.leaves(controls), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(before[jnp.array([0, -1])], after[jnp.array([0, -1])])
        assert (before[1:-1] != after[1:-1]).any()


def test_a_curve_goes_round_a_barrier():
    def loss(w, batch=None):  # A ring of minima with a hill in the middle.
        del batch
        return (jnp.sum(w**2) - 1.0) ** 2

    ends = [jnp.array([1.0, 0.2]), jnp.array([-1.0, 0.2])]
    straight = measures.linear_barrier(loss, *ends)
    for basis, num_bends in ((curves.bezier, 4), (curves.polychain, 5)):
        controls = curves.control_points(ends, num_bends)
        controls = curves.train(loss, controls, optax.adam(0.05), [None] * 400, basis=basis)
        positions, losses = curves.evaluate(loss, controls, basis=basis)
        assert measures.barrier_height(positions, losses) < 0.15 * straight.height


def test_evaluation_over_batches_and_with_statistics():
    controls = curves.control_points([problem.params(s, jnp.float32) for s in range(2)])
    data = problem.batches(dtype=jnp.float32)
    positions, losses = curves.evaluate(problem.loss_fn, controls, data, positions=[0.0, 0.4])
    whole = problem.flat_data(data)
    for position, value in zip(positions, losses, strict=True):
        expected = problem.loss_fn(curves.point(controls, position), whole)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def statistics_fn(params, batch):
        del params
        return {"mean": jnp.mean(batch[0]), "square": jnp.mean(batch[0] ** 2)}

    def normalised(params, statistics, batch):
        x = (batch[0] - statistics["mean"]) / jnp.sqrt(
            statistics["square"] - statistics["mean"] ** 2
        )
        return problem.loss_fn(params, (x, batch[1]))

    _, with_statistics = curves.evaluate(
        normalised, controls, data, positions=[0.4], statistics_fn=statistics_fn
    )
    x = (whole[0] - whole[0].mean()) / whole[0].std()
    expected = problem.loss_fn(curves.point(controls, 0.4), (x, whole[1]))
    np.testing.assert_allclose(with_statistics[0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: curves.bezier(0.5, 1), "num_bends=1"),
        (lambda: curves.polychain(0.5, 0), "num_bends=0"),
        (lambda: curves.control_points([jnp.ones(2)]), "num_solutions=1"),
        (lambda: curves.control_points([jnp.ones(2), jnp.ones(3)]), "differ in shape"),
        (lambda: curves.fixed_points(3, 4), "must be a multiple of 2"),
        (lambda: curves.curve_loss(problem.loss_fn, weight_decay=-1.0), "weight_decay"),
        (lambda: curves.evaluate(problem.loss_fn, jnp.ones(3), ()), "batches is empty"),
        (lambda: curves.evaluate(jnp.sum, jnp.ones(3), positions=[]), "positions has shape"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_progress_bar(capsys):
    curves.train(
        lambda w, batch: jnp.sum(w**2), jnp.ones((3, 2)), optax.sgd(0.1), range(3), progress=True
    )
    assert "curve" in capsys.readouterr().err
