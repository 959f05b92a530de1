"""ZSharp."""

import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests import cases

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.zsharp(RHO, quantile=0.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_it_keeps_the_share_of_each_leaf_that_stands_out():
    grads = {"a": jnp.arange(100.0) ** 2, "b": -(jnp.arange(40.0) ** 3)}
    direction = flatopt.keep_large_zscores(0.9)
    kept, _ = direction.update(grads, direction.init(grads))
    for name, leaf in kept.items():
        assert int((leaf != 0).sum()) == leaf.size // 10
        np.testing.assert_array_equal(leaf[leaf != 0], grads[name][leaf != 0])
