"""SASSHA and Momentum-SASSHA: the recorded runs, Newton's step, and when curvature is estimated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._sam.sassha import absolute_diagonal, stable_step
from tests import cases
from tests.replay import (
    ATOL,
    Array,
    Golden,
    Params,
    assert_agrees,
    logits,
    mlp_loss,
    problem,
    replay,
    replays,
)

BUFFERS = {
    "exp_avg": lambda state: optax.tree.get(state, "mu"),
    "exp_hessian": lambda state: optax.tree.get(state, "nu"),
}


@replays("sassha")
def test_replays(golden: Golden) -> None:
    """Gradient and Hessian at the ascended point."""
    assert_agrees(_results(golden), replay(golden, _sassha(golden), buffers=BUFFERS))


@replays("sassha_official")
def test_replays_the_official_order(golden: Golden) -> None:
    """The official loop brings the weights back before it differentiates the gradient again.

    What autograd saved by reference is then that of the clean point, what it saved by value that of
    the ascended one. With such products flatopt must reproduce the file, and differ without.
    """
    recorded = _results(golden)
    mixed = replay(golden, _sassha(golden), buffers=BUFFERS, extra_grad=_mixed_gradient(golden))
    assert_agrees(recorded, mixed)
    correct = replay(golden, _sassha(golden), buffers=BUFFERS)
    if "H" not in golden.arrays and golden.hyper["rho"] > 0:  # A quadratic saves no weights.
        difference = [np.abs(correct[k] - v).max() for k, v in recorded.items() if "hess" in k]
        assert max(difference) > 1e5 * ATOL


@replays("msassha")
def test_replays_momentum_sassha(golden: Golden) -> None:
    """One gradient a step, taken where the momentum has led, and the Hessian there too."""
    hyper = golden.hyper
    tx = flatopt.msam(optax.chain(_scaler(golden), *_descent(golden)), hyper["rho"])
    assert_agrees(golden.results, replay(golden, tx, buffers=BUFFERS))


def _options(golden: Golden) -> dict[str, Any]:
    hyper = golden.hyper
    b1, b2 = hyper["betas"]
    every = hyper["lazy_hessian"]
    power = hyper.get("hessian_power", 1.0)
    noise = _recorded_probes(golden, every)
    return {"b1": b1, "b2": b2, "power": power, "eps": hyper["eps"], "every": every, "noise": noise}


def _scaler(golden: Golden) -> optax.GradientTransformation:
    return flatopt.scale_by_hutchinson(**_options(golden))


def _descent(golden: Golden) -> tuple[optax.GradientTransformation, ...]:
    decay = optax.add_decayed_weights(golden.hyper["weight_decay"])
    return decay, optax.scale_by_learning_rate(golden.learning_rate)


def _sassha(golden: Golden) -> optax.GradientTransformation:
    rho = golden.hyper["rho"]
    ascent = flatopt.scale_to_adaptive_norm(rho) if golden.hyper.get("adaptive") else None
    method = flatopt.sassha(rho, perturbation=ascent, **_options(golden))
    return optax.chain(method, *_descent(golden))


def _results(golden: Golden) -> dict[str, Array]:
    """The file's results; with radius 0 there is no second point."""
    results = golden.results
    return {k: v for k, v in results.items() if golden.hyper["rho"] or not k.startswith("pert/")}


def _recorded_probes(golden: Golden, every: int) -> optax.GradientTransformation:
    """The recorded draws, one an estimate."""
    draws = {name: jnp.asarray(z) for name, z in golden.tree("z").items()}
    assert {len(z) for z in draws.values()} == {-(-golden.steps // every)}

    def update(updates: Any, number: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del updates, params
        return {name: z[number] for name, z in draws.items()}, number + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)


def _mixed_gradient(golden: Golden) -> Any:
    """The gradient at the point, whose derivative is the official program's."""
    loss_fn, _ = problem(golden)

    @jax.custom_jvp
    def gradient(clean: Params, point: Params, data: tuple[jax.Array, ...]) -> Params:
        del clean
        return jax.grad(loss_fn)(point, *data)

    @gradient.defjvp
    def product(primals: Any, tangents: Any) -> tuple[Params, Params]:
        clean, point, data = primals
        grads, z = gradient(*primals), tangents[1]
        if loss_fn is not mlp_loss:
            return grads, jax.jvp(lambda p: gradient(clean, p, data), (point,), (z,))[1]
        return grads, _mixed_product(clean, point, z, *data)

    return gradient


def _mixed_product(clean: Params, point: Params, z: Params, x: jax.Array, y: jax.Array) -> Params:
    """Reverse mode over the backward pass, with the second layer's weights of the clean point.

    They are what both passes of the second layer saved by reference. All other values are those of
    the ascended point: activations, and the signals of its backward pass.
    """
    w, w_clean = point["fc2.weight"], clean["fc2.weight"]
    h = jnp.tanh(x @ point["fc1.weight"].T + point["fc1.bias"][None])
    probabilities = jax.nn.softmax(logits(point, x))
    signal = (probabilities - jax.nn.one_hot(y, probabilities.shape[1])) / len(x)
    slope, back = 1 - h**2, signal @ w
    # Of the backward pass, from the gradients of the first layer up to the signal at the outputs.
    of_first = x @ z["fc1.weight"].T + z["fc1.bias"][None]
    of_back = of_first * slope
    of_signal = of_back @ w_clean.T + h @ z["fc2.weight"].T + z["fc2.bias"][None]
    of_h = of_first * back * -2 * h + signal @ z["fc2.weight"]
    # Of the forward pass, from the outputs down to the first layer.
    centred = of_signal - jnp.sum(probabilities * of_signal, axis=1, keepdims=True)
    of_outputs = probabilities * centred / len(x)
    of_sums = (of_h + of_outputs @ w_clean) * slope
    return {
        "fc1.weight": of_sums.T @ x,
        "fc1.bias": of_sums.sum(0),
        "fc2.weight": of_outputs.T @ h + signal.T @ of_back,
        "fc2.bias": of_outputs.sum(0),
    }


def test_on_an_ellipsoid_it_is_newton_s_step():
    """The Hessian is diagonal, so that one probe tells it exactly; the first means are debiased."""
    curvature, w = jnp.array([1.0, 4.0, 100.0]), jnp.array([3.0, 1.0, -2.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(curvature * w**2))
    tx = flatopt.scale_by_hutchinson(power=1.0, eps=1e-12)
    step, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(step, w, rtol=1e-6)
    np.testing.assert_allclose(state.nu / (1 - 0.999), curvature, rtol=1e-4)


def test_with_radius_zero_it_is_the_scaler_and_takes_no_second_gradient():
    scaler = flatopt.scale_by_hutchinson(every=3)
    cases.assert_equal(
        cases.run(optax.chain(flatopt.sassha(0.0, every=3), cases.sgd())),
        cases.run(optax.chain(scaler, cases.sgd())),
    )


def test_it_looks_at_the_ascended_point():
    """There the gradient is that of SAM, and the curvature that of the same place."""
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(w**4))
    w, rho = jnp.array([1.0, 2.0]), 0.5
    climbed = w + rho * grad_fn(w) / jnp.linalg.norm(grad_fn(w))
    for tx, at in ((flatopt.sassha(rho, power=1.0), climbed), (flatopt.sassha(0.0, power=1.0), w)):
        step, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        np.testing.assert_allclose(step, 4 * at**3 / (12 * at**2 + 1e-4), rtol=1e-6)
    # After `sam`, in a chain, the gradient alone is that of the ascended point.
    tx = optax.chain(flatopt.sam(rho), flatopt.scale_by_hutchinson(power=1.0))
    step, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(step, 4 * climbed**3 / (12 * w**2 + 1e-4), rtol=1e-6)


@pytest.mark.parametrize("hold", [False, True])
def test_inside_a_displaced_optimiser_it_looks_where_the_gradient_was_taken(hold: bool):
    points = []

    def grad_fn(w: jax.Array, _: Any) -> jax.Array:
        points.append(w)
        return w**3

    inner = optax.chain(flatopt.scale_by_hutchinson(every=1), optax.scale(-0.1))
    ascent = flatopt.scale_to_norm(0.5)
    tx = flatopt.hold_perturbed(inner, ascent) if hold else flatopt.msam(inner, 0.5)
    w = jnp.array([1.0, 2.0])
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(w**3, state, w, grad_fn=grad_fn)
        np.testing.assert_array_equal(points[-1].primal, w)
        w = optax.apply_updates(w, updates)
    assert jnp.linalg.norm(w - flatopt.eval_params(state, w)) > 0.49


def test_estimates_come_every_so_many_updates_and_are_debiased_by_the_update():
    b2, w = 0.9, jnp.array([1.0, 2.0])
    tx = flatopt.scale_by_hutchinson(b1=0.0, b2=b2, power=1.0, eps=1e-12, every=3)
    state, nu = tx.init(w), 0.0
    for t in range(1, 8):
        curvature = float(t)
        grad_fn = flatopt.make_grad_fn(lambda w, c: 0.5 * c * jnp.sum(w**2), curvature)
        step, state = tx.update(jnp.ones(2), state, w, grad_fn=grad_fn)
        if (t - 1) % 3 == 0:
            nu, last = b2 * nu + (1 - b2) * curvature, t
        np.testing.assert_allclose(state.nu, nu, rtol=1e-5)
        np.testing.assert_allclose(step, (1 - b2**last) / nu, rtol=1e-5)


def test_every_is_ten_unless_told_otherwise():
    w = jnp.ones(2)
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(w**2))
    tx = flatopt.scale_by_hutchinson()
    state, seen = tx.init(w), []
    for _ in range(21):
        _, state = tx.update(w, state, w, grad_fn=grad_fn)
        seen.append(float(state.nu[0]))
    assert np.flatnonzero(np.diff(seen, prepend=0.0)).tolist() == [0, 10, 20]


def test_probes_are_signs_and_the_estimate_is_that_of_the_product():
    hessian = jnp.array([[2.0, -1.0], [-1.0, 3.0]])
    z = jnp.array([1.0, -1.0])
    found = absolute_diagonal(lambda w: hessian @ w, jnp.zeros(2), z)
    np.testing.assert_allclose(found, jnp.abs(z * (hessian @ z)))
    tx, w = flatopt.scale_by_hutchinson(every=1, b2=0.0), jnp.ones(500)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w * jnp.arange(500.0))
    np.testing.assert_allclose(state.nu, jnp.arange(500.0), rtol=1e-6)  # As |z| is 1 everywhere.


def test_curvature_of_either_sign_and_none():
    w = jnp.array([1.0, 1.0, 1.0])
    grad_fn = flatopt.make_grad_fn(lambda w: w[0] ** 2 - w[1] ** 2 + w[2])
    tx = flatopt.scale_by_hutchinson(power=1.0, eps=0.5)
    step, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(step, [2 / 2.5, -2 / 2.5, 1 / 0.5], rtol=1e-6)
    assert not jnp.isnan(stable_step(jnp.zeros(1), jnp.zeros(1), 0.5, 1e-4)).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_shows_and_is_not_kept(bad: float):
    """Of the gradient and of the curvature: divided by inf, a step would be a quiet zero."""
    w, tx = jnp.ones(2), flatopt.scale_by_hutchinson()
    state = tx.init(w)
    for grads, grad_fn in ((w, lambda w, i: bad * w), (bad * w, lambda w, i: w)):
        step, kept = tx.update(grads, state, w, grad_fn=grad_fn)
        assert not jnp.isfinite(step).any()
        cases.assert_equal(kept, state)


@pytest.mark.parametrize("kwargs", [{"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"power": -1.0}])
def test_arguments_out_of_range_raise(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        flatopt.sassha(0.1, **kwargs)
