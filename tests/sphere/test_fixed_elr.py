"""SGD on the sphere at a fixed effective learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays


def normalise(x: jax.Array) -> jax.Array:
    """BatchNorm without scale and shift, by the statistics of the batch."""
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-5)


def invariant_loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """Two layers whose weights have a direction but, up to the 1e-5, no length."""
    hidden = jnp.tanh(normalise(x @ params["fc1.weight"].T))
    hidden = jnp.tanh(normalise(hidden @ params["fc2.weight"].T))
    logits = hidden @ params["out.weight"].T + params["out.bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@replays("sphere")
def test_replays(golden: Golden) -> None:
    """With filters the learning rate is in units of the squared norm of all of them together."""
    hyper, start = golden.hyper, golden.params
    sphere = {name: name.startswith("fc") for name in start}
    kernels = [w for name, w in start.items() if sphere[name]]
    squares = sum(jnp.sum(w**2) for w in kernels)
    elr, groups, radius, units = hyper["elr"], "all", None, 1
    if hyper["mode"] == "filters":
        units = sum(len(w) for w in kernels)
        elr, groups, radius = elr * units, "unit", jnp.sqrt(squares / units)
    own = hyper["elr"] * squares
    rest = own if hyper["noninvlr"] == -1 else hyper["noninvlr"]
    on_sphere = flatopt.fixed_elr(elr, groups, radius=radius, filter_axis=0)
    tx = optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"]),
        optax.trace(hyper["momentum"]),
        optax.partition({True: on_sphere, False: optax.sgd(rest)}, sphere),
    )
    replayed = replay(golden, tx, loss_fn=invariant_loss)
    radii = optax.tree.get(tx.init(start), "radii")
    norms = jnp.concatenate([r.ravel() for r in radii])
    replayed |= {"pnorm": np.asarray(norms.mean()), "lr": np.asarray(own)}
    np.testing.assert_allclose(norms, replayed["pnorm"], rtol=1e-12)
    assert_agrees(golden.results, replayed)


def _problem() -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"fc1.weight": (6, 4), "fc2.weight": (6, 6), "out.weight": (3, 6), "out.bias": (3,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)
    return params, x, jnp.asarray(rng.integers(0, 3, 24))


LABELS = {"fc1.weight": "sphere", "fc2.weight": "sphere", "out.weight": None, "out.bias": None}


def _train(tx: optax.GradientTransformation, params: Any, steps: int = 10) -> Any:
    _, x, y = _problem()
    opt_state = tx.init(params)
    for _ in range(steps):
        grads = jax.grad(invariant_loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_the_norm_stays_and_other_leaves_stand_still():
    params, x, y = _problem()
    trained = _train(flatopt.fixed_elr(0.01, LABELS), params)
    first, last = (optax.tree.norm([p["fc1.weight"], p["fc2.weight"]]) for p in (params, trained))
    np.testing.assert_allclose(last, first, rtol=1e-6)
    cases.assert_equal(
        [trained["out.weight"], trained["out.bias"]], [params["out.weight"], params["out.bias"]]
    )
    assert invariant_loss(trained, x, y) < 0.9 * invariant_loss(params, x, y)


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_length_of_the_start_does_not_matter(scale: float):
    """The directions take one path on spheres of every radius: that is what the rate fixes."""
    params, *_ = _problem()
    longer = {k: scale * w if LABELS[k] else w for k, w in params.items()}
    plain, scaled = (_train(flatopt.fixed_elr(0.01, LABELS), p) for p in (params, longer))
    for name in ("fc1.weight", "fc2.weight"):
        np.testing.assert_allclose(scaled[name] / scale, plain[name], rtol=2e-3, atol=2e-4)


def test_on_the_unit_sphere_it_is_projected_sgd():
    params = {"w": jnp.array([0.6, 0.8])}
    grads = {"w": jnp.array([1.0, -2.0])}
    projected = optax.chain(optax.sgd(0.3), flatopt.project_to_sphere())
    for tx in (flatopt.fixed_elr(0.3), projected):
        updates, _ = tx.update(grads, tx.init(params), params)
        moved = jnp.array([0.6 - 0.3, 0.8 + 0.6])
        reached = optax.apply_updates(params, updates)["w"]
        np.testing.assert_allclose(reached, moved / jnp.linalg.norm(moved), rtol=1e-6)


@pytest.mark.parametrize("radius", [0.5, 4.0])
def test_the_radius_of_sam_is_an_angle(radius: float):
    """On a sphere of radius r, rho = r tan(angle) takes the gradient at that angle."""
    angle, w = 0.2, radius * jnp.array([0.6, 0.8])
    points = []

    def grad_fn(point: jax.Array, _: int) -> jax.Array:
        points.append(point)
        return jax.grad(lambda p: p[0] / jnp.linalg.norm(p))(point)

    tx = optax.chain(flatopt.sam(radius * jnp.tan(angle)), flatopt.fixed_elr(0.1))
    updates, _ = tx.update(grad_fn(w, 0), tx.init(w), w, grad_fn=grad_fn)
    cosine = points[1] @ w / jnp.linalg.norm(points[1]) / jnp.linalg.norm(w)
    np.testing.assert_allclose(jnp.arccos(cosine), angle, rtol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(w + updates), radius, rtol=1e-6)
