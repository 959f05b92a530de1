"""The return to the sphere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from tests import cases

PARAMS = {"a": jnp.array([[3.0, 1.0], [4.0, 2.0]]), "b": jnp.array([6.0, 8.0])}


def _step(tx, updates, params, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        moves, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, moves)
    return params


@pytest.mark.parametrize("tangent", [False, True])
def test_each_group_keeps_its_own_norm(tangent: bool):
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    norm = jnp.linalg.norm

    def land(groups):
        return _step(flatopt.project_to_sphere(groups, tangent=tangent), updates, PARAMS, 3)

    whole, leaves = land("all"), land("leaf")
    np.testing.assert_allclose(optax.tree.norm(whole), optax.tree.norm(PARAMS), rtol=1e-6)
    assert abs(norm(whole["b"]) - norm(PARAMS["b"])) > 0.01
    for name in PARAMS:
        np.testing.assert_allclose(norm(leaves[name]), norm(PARAMS[name]), rtol=1e-6)
    assert abs(norm(leaves["a"][0]) - norm(PARAMS["a"][0])) > 0.01
    units, rows = (
        _step(flatopt.project_to_sphere("unit", filter_axis=axis), updates, PARAMS)
        for axis in (None, 0)
    )
    np.testing.assert_allclose(norm(units["a"], axis=0), norm(PARAMS["a"], axis=0), rtol=1e-6)
    np.testing.assert_allclose(norm(rows["a"], axis=1), norm(PARAMS["a"], axis=1), rtol=1e-6)
    np.testing.assert_allclose(norm(units["b"]), norm(PARAMS["b"]), rtol=1e-6)  # A bias is one.


def test_labels_say_what_shares_a_sphere_and_what_moves_freely():
    params = {"x": PARAMS, "y": jnp.array([1.0, 2.0]), "free": jnp.array([5.0])}
    labels = {"x": "one", "y": "one", "free": None}
    updates = jax.tree.map(jnp.ones_like, params)
    for groups in (labels, lambda tree: labels):
        landed = _step(flatopt.project_to_sphere(groups), updates, params)
        first, last = (optax.tree.norm([p["x"], p["y"]]) for p in (params, landed))
        np.testing.assert_allclose(last, first, rtol=1e-6)
        np.testing.assert_array_equal(landed["free"], [6.0])
        state = flatopt.project_to_sphere(groups).init(params)
        np.testing.assert_allclose(optax.tree.get(state, "radii"), [first], rtol=1e-6)


def test_labels_stand_inside_masked_and_partition():
    labels = {"a": "one", "b": None}
    tx = optax.masked(flatopt.project_to_sphere(labels), {"a": True, "b": False})
    landed = _step(tx, jax.tree.map(jnp.ones_like, PARAMS), PARAMS)
    np.testing.assert_allclose(
        jnp.linalg.norm(landed["a"]), jnp.linalg.norm(PARAMS["a"]), rtol=1e-6
    )
    np.testing.assert_array_equal(landed["b"], PARAMS["b"] + 1)


@pytest.mark.parametrize("groups", ["layer", {"a": 1}, {"a": 1, "b": 2, "c": 3}])
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(ValueError, match=r"groups=.* must be one of all, leaf, unit"):
        flatopt.project_to_sphere(groups).init(PARAMS)


def test_tangent_takes_the_way_along_the_sphere():
    """A step along the weights leads nowhere; one across is untouched before the return."""
    w = jnp.array([3.0, 4.0])
    along, across = w, jnp.array([-4.0, 3.0])
    tx = flatopt.project_to_sphere(tangent=True)
    np.testing.assert_allclose(_step(tx, -0.9 * along, w), w, rtol=1e-6)
    both = _step(tx, across + 7 * along, w)
    np.testing.assert_allclose(both, _step(flatopt.project_to_sphere(), across, w), rtol=1e-5)


def test_where_there_is_no_direction_nothing_moves():
    w, zeros = jnp.array([3.0, 4.0]), jnp.zeros(2)
    for radius in (None, 2.0):
        tx = flatopt.project_to_sphere(radius=radius)
        np.testing.assert_array_equal(_step(tx, -w, w), w)  # A step onto the origin.
        np.testing.assert_array_equal(_step(tx, zeros, zeros), zeros)
    # A sphere of radius 0 is a point.
    np.testing.assert_array_equal(_step(flatopt.project_to_sphere(), w, zeros), zeros)
    landed = _step(flatopt.project_to_sphere(radius=2.0), w, zeros)
    np.testing.assert_allclose(landed, [1.2, 1.6], rtol=1e-6)


@pytest.mark.parametrize("groups", ["all", "leaf", "unit"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_shows(groups: str, bad: float):
    updates = {"a": jnp.zeros((2, 2)).at[0, 1].set(bad), "b": jnp.zeros(2)}
    landed = _step(flatopt.project_to_sphere(groups), updates, PARAMS)
    assert not jnp.isfinite(landed["a"][0, 1])


def test_weights_that_get_no_gradient_stay_where_they_are():
    """Over a thousand updates, up to the rounding of one; a label None keeps them bit for bit."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32), "frozen": jnp.ones(3) / 3}
    tx = optax.chain(optax.sgd(0.1), flatopt.project_to_sphere({"w": "w", "frozen": None}))
    update = jax.jit(tx.update)
    state, zeros, moved = tx.init(params), jax.tree.map(jnp.zeros_like, params), params
    for _ in range(1000):
        updates, state = update(zeros, state, moved)
        moved = optax.apply_updates(moved, updates)
    np.testing.assert_allclose(moved["w"], params["w"], rtol=5e-7)
    np.testing.assert_array_equal(moved["frozen"], params["frozen"])


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("groups", ["all", "unit"])
def test_weights_of_every_size(groups: str, size: float):
    """Their squares leave the range of float32."""
    tx = flatopt.project_to_sphere(groups, tangent=True)
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    small, plain = (
        _step(tx, optax.tree.scale(s, updates), optax.tree.scale(s, PARAMS)) for s in (size, 1.0)
    )
    cases.assert_close(optax.tree.scale(1 / size, small), plain)


def test_half_precision_does_not_wander_off():
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=200), jnp.bfloat16)
    tx, norm = flatopt.project_to_sphere(), optax.tree.norm(params.astype(jnp.float32))
    state = tx.init(params)
    assert state.radii[0].dtype == jnp.float32
    update = jax.jit(tx.update)
    for _ in range(200):
        step = jnp.asarray(0.1 * rng.normal(size=200), jnp.bfloat16)
        updates, state = update(step, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(optax.tree.norm(params.astype(jnp.float32)), norm, rtol=2e-3)


def test_only_scalars_travel_between_devices():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.device_put({"w": jnp.ones((64, 1024)), "v": jnp.ones((8, 4096))}, spread)
    tx = flatopt.project_to_sphere(tangent=True)
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    text = compiled.as_text()
    moved = re.findall(r"= (.*?) (all-\w+|collective-permute|reduce-scatter)\(", text)
    assert moved
    for shape, kind in moved:
        assert kind == "all-reduce", (shape, kind)
        assert not re.search(r"\[\d", shape), f"{kind} of {shape}"


def test_a_radius_may_follow_a_schedule():
    tx = flatopt.project_to_sphere(radius=optax.linear_schedule(1.0, 3.0, 2))
    state, w = tx.init(jnp.array([0.6, 0.8])), jnp.array([0.6, 0.8])
    for radius in (1.0, 2.0, 3.0, 3.0):
        updates, state = tx.update(jnp.array([0.1, 0.0]), state, w)
        w = w + updates
        np.testing.assert_allclose(jnp.linalg.norm(w), radius, rtol=1e-6)
        np.testing.assert_allclose(state.radii[0], radius, rtol=1e-6)


def test_integers_and_what_is_not_there_pass():
    w, key = jnp.array([3.0, 4.0]), jax.random.key(0)
    params = {"w": w, "count": jnp.array(3), "none": None, "key": key}
    updates = {"w": jnp.array([1.0, 0.0]), "count": jnp.array(1), "none": None, "key": None}
    for groups in ("all", "leaf", "unit"):
        tx = flatopt.project_to_sphere(groups, tangent=True)
        moves, _ = tx.update(updates, tx.init(params), params)
        assert moves["count"] == 1
        assert moves["key"] is None
        np.testing.assert_allclose(jnp.linalg.norm(w + moves["w"]), 5.0, rtol=1e-6)


def test_half_gradients_land_where_full_ones_do():
    """Rounded to the gradient's bfloat16, the way to the sphere would miss it by 2^-9."""
    w, step = jnp.linspace(0.5, 1.5, 50), jnp.full(50, 0.25, jnp.bfloat16)
    landed = _step(flatopt.project_to_sphere(), step, w)
    np.testing.assert_allclose(jnp.linalg.norm(landed), jnp.linalg.norm(w), rtol=1e-6)
