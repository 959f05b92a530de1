"""Adapter: how the recorded training of curves between two networks is built from flatopt."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import curves
from tests.replay import ATOL, RTOL, Golden, compiled, problem, torch_optimizer

BASES = {"Bezier": curves.bezier, "PolyChain": curves.polychain}


def replay_curve(golden: Golden) -> None:
    """The decay is that of the point on the curve, part of the loss, and not the optimiser's."""
    hyper, arrays = dict(golden.hyper), golden.arrays
    basis, num_bends = BASES[hyper["curve"]], int(hyper["num_bends"])
    decay = float(hyper.pop("wd", hyper.pop("weight_decay", 0.0)))
    tx = curves.keep_fixed(torch_optimizer(hyper, golden.learning_rate))
    loss_fn, batch = problem(golden)
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


ADAPTERS: dict[str, Callable[[Golden], None]] = {"curve": replay_curve}
