"""Alignment undoes permutations and leaves the network as it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.models.wide_resnet import WideResNet, residual_units
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


def _tanh_network(params, x):
    for i in range(3):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"][None]
        x = jnp.tanh(x) if i < 2 else x
    return x


def test_units_of_odd_activations_change_their_signs_too():
    params = _relu_params()
    units = measures.chain_units(params)
    rng = np.random.default_rng(3)
    orders = [rng.permutation(n) for n in (7, 5)]
    signs = [rng.choice([-1.0, 1.0], n) for n in (7, 5)]
    (p, q), (s, t) = orders, signs
    hidden = {
        "layer0": {
            "kernel": (params["layer0"]["kernel"] * s[None])[:, p],
            "bias": (params["layer0"]["bias"] * s)[p],
        },
        "layer1": {
            "kernel": (params["layer1"]["kernel"] * s[:, None] * t[None])[p][:, q],
            "bias": (params["layer1"]["bias"] * t)[q],
        },
        "layer2": {
            **params["layer2"],
            "kernel": (params["layer2"]["kernel"] * t[:, None])[q],
        },
    }
    np.testing.assert_allclose(_tanh_network(hidden, X[0]), _tanh_network(params, X[0]), rtol=1e-9)
    result = measures.align_units(params, hidden, units, signs=True)
    for one, two in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)
    for order, sign, found, flips in zip(
        orders, signs, result.permutations, result.signs, strict=True
    ):
        np.testing.assert_array_equal(order[found], np.arange(len(order)))
        np.testing.assert_array_equal(flips, sign)
    # Without signs it stays away from what the signs reach, and touches none.
    plain = measures.align_units(params, hidden, units)
    assert all((flips == 1).all() for flips in plain.signs)
    assert any(
        jnp.abs(a - b).max() > 0.1
        for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(params), strict=True)
    )


def test_signs_of_recurrent_units_act_on_both_axes():
    rng = np.random.default_rng(2)
    first = {"in": jnp.asarray(rng.normal(size=(99, 5))), "h": jnp.asarray(rng.normal(size=(5, 5)))}
    units = (measures.Units((("in", 1), ("h", 1)), (("h", 0),)),)
    signs = np.array([1.0, -1.0, -1.0, 1.0, -1.0])
    second = {"in": first["in"] * signs[None], "h": first["h"] * signs[None] * signs[:, None]}
    result = measures.align_units(first, second, units, signs=True)
    np.testing.assert_array_equal(result.params["h"], first["h"])
    np.testing.assert_array_equal(result.signs[0], signs)


@pytest.mark.parametrize("width", [1, 2])
def test_residual_networks_compute_what_they_did(width):
    """One permutation a residual stream, one for the inside of each block."""
    model = WideResNet(depth=10, width=width)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    first, second = (model.init(jax.random.key(seed), x) for seed in (0, 1))
    rng = np.random.default_rng(1)
    # Scales, shifts and statistics that differ from unit to unit: a slot left out would show.
    second = jax.tree.map(
        lambda leaf: leaf * jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), second
    )
    result = measures.align_units(first, second, residual_units(second))
    assert all((order != np.arange(len(order))).any() for order in result.permutations)
    np.testing.assert_allclose(model.apply(result.params, x), model.apply(second, x), atol=1e-5)
    back = measures.align_units(second, result.params, residual_units(second))
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
