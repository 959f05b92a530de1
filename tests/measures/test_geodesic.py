"""Geodesics stay on the spheres."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def _relu_params(seed=0, sizes=(4, 7, 5, 3)):
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=(m, n))),
            "bias": jnp.asarray(rng.normal(size=n)),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def _relu_network(params, x):
    for i in range(3):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"][None]
        x = jax.nn.relu(x) if i < 2 else x
    return x


X = jnp.asarray(np.random.default_rng(9).normal(size=(3, 8, 4)))


def test_geodesic_stays_on_the_spheres():
    units = measures.chain_units(_relu_params())
    first, second = (measures.rescale_units(_relu_params(s), units) for s in (0, 1))
    for t in (0.0, 0.3, 1.0):
        point = measures.geodesic(first, second, t, units)
        for i in range(2):
            layer = point[f"layer{i}"]
            lengths = np.sum(np.asarray(layer["kernel"]) ** 2, 0) + np.asarray(layer["bias"]) ** 2
            np.testing.assert_allclose(lengths, 1, rtol=1e-10)
    for end, t in ((first, 0.0), (second, 1.0)):
        point = measures.geodesic(first, second, t, units)
        for a, b in zip(jax.tree.leaves(point), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    # A third of the angle at a third of the way, and a network to itself does not move.
    point = measures.geodesic(first, second, 1 / 3, units)

    def unit(p):
        return np.r_[np.asarray(p["layer0"]["kernel"])[:, 0], np.asarray(p["layer0"]["bias"])[0]]

    angles = np.arccos([unit(first) @ unit(point), unit(first) @ unit(second)])
    np.testing.assert_allclose(angles[0], angles[1] / 3, rtol=1e-9)
    still = measures.geodesic(first, first, 0.4, units)
    np.testing.assert_allclose(still["layer2"]["kernel"], first["layer2"]["kernel"], rtol=1e-9)


def test_geodesic_barrier_of_a_network_with_itself_is_zero():
    params = _relu_params()

    def loss(p, x):
        return jnp.mean(_relu_network(p, x) ** 2)

    units = measures.chain_units(params)
    result = measures.geodesic_barrier(loss, params, params, X, units=units, num_points=5)
    np.testing.assert_allclose(result.height, 0, atol=1e-9)
    jitted = jax.jit(lambda p: measures.geodesic_barrier(loss, p, p, X, units=units).losses)(params)
    assert jitted.shape == (25,)


def test_a_normalised_output_layer_stays_on_its_sphere_and_keeps_the_predictions():
    units = measures.chain_units(_relu_params())
    first, second = (measures.rescale_units(_relu_params(s), units) for s in (0, 1))
    for t in (0.0, 0.3, 1.0):
        plain = measures.geodesic(first, second, t, units)
        point = measures.geodesic(first, second, t, units, normalise_output=True)
        square = sum(jnp.sum(x**2) for x in jax.tree.leaves(point["layer2"]))
        np.testing.assert_allclose(square, 1, rtol=1e-12)
        np.testing.assert_array_equal(
            *(jnp.argmax(_relu_network(p, X[0]), axis=1) for p in (plain, point))
        )
        np.testing.assert_allclose(point["layer1"]["kernel"], plain["layer1"]["kernel"])

    def loss(p, x):
        return jnp.mean(_relu_network(p, x) ** 2)

    result = measures.geodesic_barrier(
        loss, first, second, X, units=units, normalise_output=True, num_points=3
    )
    middle = measures.geodesic(first, second, 0.5, units, normalise_output=True)
    np.testing.assert_allclose(result.losses[1], loss(middle, X.reshape(-1, 4)), rtol=1e-9)


def test_an_output_layer_of_zeros_is_not_normalised():
    point = measures.geodesic(jnp.zeros(2), jnp.zeros(2), 0.5, (), normalise_output=True)
    np.testing.assert_array_equal(point, jnp.zeros(2))
