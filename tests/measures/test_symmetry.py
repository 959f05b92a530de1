"""Permutations and rescalings leave the network as it is."""

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


def _tied(seed=0):
    kernel = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6)))
    units = (measures.Units((("e/kernel", -1),), (("e/kernel", 1),)),)
    return {"e": {"kernel": kernel}}, units


def test_tied_weights_are_permuted_once():
    first, units = _tied()
    order = np.random.default_rng(1).permutation(6)
    second = {"e": {"kernel": first["e"]["kernel"][:, order]}}
    result = measures.align_units(first, second, units)
    np.testing.assert_array_equal(result.params["e"]["kernel"], first["e"]["kernel"])
    np.testing.assert_array_equal(order[result.permutations[0]], np.arange(6))
    assert result.sweeps == 2


def test_recurrent_units_are_permuted_on_both_axes():
    rng = np.random.default_rng(2)
    first = {"in": jnp.asarray(rng.normal(size=(9, 5))), "h": jnp.asarray(rng.normal(size=(5, 5)))}
    units = (measures.Units((("in", 1), ("h", 1)), (("h", 0),)),)
    order = rng.permutation(5)
    second = {"in": first["in"][:, order], "h": first["h"][order][:, order]}
    result = measures.align_units(first, second, units)
    np.testing.assert_array_equal(result.params["h"], first["h"])


def test_tied_weights_are_not_rescaled_and_belong_to_one_set():
    params, units = _tied()
    with pytest.raises(ValueError, match="'e/kernel' is tied"):
        measures.rescale_units(params, units)
    twice = (measures.Units(units[0].incoming, ()), measures.Units(units[0].outgoing, ()))
    for call in (
        lambda: measures.align_units(params, params, twice),
        lambda: measures.geodesic(params, params, 0.5, twice),
    ):
        with pytest.raises(ValueError, match="in two sets"):
            call()
