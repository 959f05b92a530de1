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
