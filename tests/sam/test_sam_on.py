"""SAM-ON."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flatopt
from tests import cases

EVERYWHERE = functools.partial(jax.tree.map, lambda p: True)
RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.sam_on(RHO, mask=EVERYWHERE), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_normalization_layers_are_found():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x)))

    params = Net().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    mask = flatopt.normalisation_mask(params)
    assert {k: all(jax.tree.leaves(v)) for k, v in mask.items()} == {
        "BatchNorm_0": True,
        "Dense_0": False,
        "LayerNorm_0": True,
    }

    class NnxNet(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))

    nnx_params = nnx.state(NnxNet(), nnx.Param)
    mask = nnx.to_pure_dict(flatopt.normalisation_mask(nnx_params))
    assert [bool(x) for x in jax.tree.leaves(mask["norm"])] == [True, True]
    assert [bool(x) for x in jax.tree.leaves(mask["dense"])] == [False, False]
    with pytest.raises(ValueError, match="no leaf named 'scale'"):
        flatopt.normalisation_mask(cases.init_params())
