"""Curves: coefficients, control points, what stays fixed, training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import comb

import flatopt
from flatopt import curves, measures
from tests.measures import problem
from tests.replay import ATOL, RTOL, Golden, compiled, replays, torch_optimizer
from tests.replay import problem as golden_problem


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


BASES = {"Bezier": curves.bezier, "PolyChain": curves.polychain}


@replays("curve")
def test_replays(golden: Golden):
    """The decay is that of the point on the curve, part of the loss, and not the optimiser's."""
    hyper, arrays = dict(golden.hyper), golden.arrays
    basis, num_bends = BASES[hyper["curve"]], int(hyper["num_bends"])
    decay = float(hyper.pop("wd", hyper.pop("weight_decay", 0.0)))
    tx = curves.keep_fixed(torch_optimizer(hyper, golden.learning_rate))
    loss_fn, batch = golden_problem(golden)
    total = curves.curve_loss(loss_fn, basis, weight_decay=decay)

    coefficients = jax.vmap(lambda t: basis(t, num_bends))(jnp.asarray(arrays["coeff_t"]))
    _assert_close("coeffs", coefficients, arrays["coeffs"])

    @compiled
    def step(controls, opt_state, position, t):
        value, grads = jax.value_and_grad(total)(controls, position, *batch(t, 0))
        plain = loss_fn(curves.point(controls, position, basis), *batch(t, 0))
        updates, opt_state = tx.update(grads, opt_state, controls)
        return optax.apply_updates(controls, updates), opt_state, value, plain

    start = golden.params
    grads = jax.grad(loss_fn)(start, *batch(0, 0))
    for name, value in golden.tree("grad0").items():
        _assert_close(f"grad0/{name}", grads[name], value)
    end = {name: jnp.asarray(value) for name, value in golden.tree("p_end").items()}
    controls = curves.control_points([start, end], num_bends)
    opt_state = tx.init(controls)
    trajectory, totals, plains = [controls], [], []
    for t, position in enumerate(arrays["t_sample"]):
        controls, opt_state, value, plain = step(controls, opt_state, position, t)
        trajectory.append(controls)
        totals.append(value)
        plains.append(plain)
    assert len(totals) == golden.steps
    _assert_close("loss_total", totals, arrays["loss_total"])
    recorded = golden.tree("traj")
    assert set(recorded) == {f"{name}_{j}" for name in start for j in range(num_bends)}
    for key, value in recorded.items():
        name, _, j = key.rpartition("_")
        _assert_close(key, [c[name][int(j)] for c in trajectory], value)
    if "loss" in arrays:
        _assert_close("loss", totals, arrays["loss"])
    if decay == 0:
        _assert_close("the loss without decay", plains, totals)
    else:  # What the decay adds is there, and is not nothing.
        assert (np.asarray(totals) > np.asarray(plains)).all()


def _assert_close(name: str, actual: object, desired: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), RTOL, ATOL, err_msg=name)
