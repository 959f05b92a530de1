"""Two networks: similarity, barriers, symmetries, geodesics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests import measures_problem as problem


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


# Similarity


def test_cka_is_the_unbiased_estimate_by_hand():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()

    def hsic(k, m):  # As in its definition, with the diagonals removed.
        n = len(k)
        k, m = (x - np.diag(np.diag(x)) for x in (k, m))
        one = np.ones(n)
        both = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (both - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    sums = np.zeros(3)
    for i in range(problem.N):
        batch = jax.tree.map(lambda x, i=i: x[i], data)
        k, m = (np.asarray(f @ f.T) for f in (problem.model_fn(p, batch) for p in (first, second)))
        sums += [hsic(k, m), hsic(k, k), hsic(m, m)]
    value = measures.cka(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, sums[0] / np.sqrt(sums[1] * sums[2]), rtol=1e-9)
    np.testing.assert_allclose(measures.cka(problem.model_fn, first, first, data), 1, rtol=1e-9)


def test_cka_of_unrelated_features_is_about_zero_for_small_batches():
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(400, 6, 20)))

    halves = {"w": jnp.zeros(1)}
    value = measures.cka(
        lambda p, x: x[:, :10] + p["w"][None],
        halves,
        halves,
        data,
        other_features_fn=lambda p, x: x[:, 10:] + p["w"][None],
    )
    assert abs(value) < 0.05


def test_prediction_disagreement():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    whole = problem.flat_data(data)
    votes = [jnp.argmax(problem.model_fn(p, whole), axis=1) for p in (first, second)]
    value = measures.prediction_disagreement(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, np.mean(votes[0] != votes[1]))
    assert measures.prediction_disagreement(problem.model_fn, first, first, data) == 0
    broken = jax.tree.map(lambda x: x * jnp.nan, first)
    assert np.isnan(measures.prediction_disagreement(problem.model_fn, first, broken, data))


# Barriers and symmetries


def test_linear_barrier():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    result = measures.linear_barrier(problem.loss_fn, first, second, data, num_points=5)
    whole = problem.flat_data(data)
    losses = [
        problem.loss_fn(jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, first, second), whole)
        for t in np.linspace(0, 1, 5)
    ]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-10)
    np.testing.assert_allclose(result.height, max(losses - np.linspace(losses[0], losses[-1], 5)))


def test_rescaling_keeps_the_function_and_normalises():
    params = _relu_params()
    units = measures.chain_units(params)
    scaled = jax.jit(lambda p: measures.rescale_units(p, units))(params)
    for x in X:
        np.testing.assert_allclose(_relu_network(scaled, x), _relu_network(params, x), rtol=1e-10)
    for i in range(2):
        layer = scaled[f"layer{i}"]
        lengths = np.sum(np.asarray(layer["kernel"]) ** 2, axis=0) + np.asarray(layer["bias"]) ** 2
        np.testing.assert_allclose(lengths, 1, rtol=1e-12)


def test_alignment_undoes_a_permutation():
    params = _relu_params()
    units = measures.chain_units(params)
    rng = np.random.default_rng(3)
    first, second = rng.permutation(7), rng.permutation(5)
    hidden = {
        "layer0": {k: v[..., first] for k, v in params["layer0"].items()},
        "layer1": {
            "kernel": params["layer1"]["kernel"][first][:, second],
            "bias": params["layer1"]["bias"][second],
        },
        "layer2": {**params["layer2"], "kernel": params["layer2"]["kernel"][second]},
    }
    np.testing.assert_allclose(_relu_network(hidden, X[0]), _relu_network(params, X[0]), rtol=1e-10)
    result = measures.align_units(params, hidden, units)
    for one, two in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(first[result.permutations[0]], np.arange(7))
    np.testing.assert_array_equal(second[result.permutations[1]], np.arange(5))


def test_alignment_keeps_the_function_and_brings_networks_closer():
    first, second = _relu_params(0), _relu_params(1)
    result = measures.align_units(first, second, measures.chain_units(first))
    aligned = result.params
    np.testing.assert_allclose(
        _relu_network(aligned, X[0]), _relu_network(second, X[0]), rtol=1e-10
    )

    def distance(a, b):
        return sum(
            float(jnp.sum((x - y) ** 2))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    assert distance(first, aligned) < 0.9 * distance(first, second)


def test_chain_units_sort_layers_by_number_and_know_convolutions():
    layers = {f"Dense_{i}": {"kernel": jnp.ones((i + 1, i + 2))} for i in range(12)}
    units = measures.chain_units(layers)
    assert [group.incoming[0][0] for group in units] == [f"Dense_{i}/kernel" for i in range(11)]
    convolutions = {
        "a": {"kernel": jnp.ones((3, 3, 2, 4))},
        "b": {"kernel": jnp.ones((3, 3, 4, 5))},
    }
    scaled = measures.rescale_units(convolutions, measures.chain_units(convolutions))
    np.testing.assert_allclose(scaled["a"]["kernel"], np.full((3, 3, 2, 4), 1 / np.sqrt(18)))


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
