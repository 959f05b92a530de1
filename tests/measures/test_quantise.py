"""Weights on the grid, and the gap that rounding leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_weights_lie_on_the_grid(bits, per_channel):
    params = problem.params()
    rounded = measures.quantise(params, bits, per_channel=per_channel)
    for name, layer in params.items():
        np.testing.assert_array_equal(layer["bias"], rounded[name]["bias"])
        kernel = np.asarray(layer["kernel"])
        axis = 0 if per_channel else None
        step = abs(kernel).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
        levels = rounded[name]["kernel"] / step
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)
        assert (abs(rounded[name]["kernel"] - kernel) <= step / 2 + 1e-12).all()


def test_quantisation_gap():
    params, data = problem.params(), problem.batches()
    whole = problem.flat_data(data)
    for bits in (4, 8):
        expected = problem.loss_fn(measures.quantise(params, bits), whole) - problem.loss_fn(
            params, whole
        )
        gap = measures.quantisation_gap(problem.loss_fn, params, data, bits=bits)
        np.testing.assert_allclose(gap, expected, rtol=1e-9)
    assert measures.quantise({"w": jnp.zeros((2, 2))})["w"].tolist() == [[0, 0], [0, 0]]
