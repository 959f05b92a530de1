"""Replicas and their barycentre."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flatopt
from tests import cases


# Making replicas and centres
def test_replicate_params():
    params = cases.init_params()
    equal = flatopt.replicate_params(params, 3)
    for replica in range(3):
        cases.assert_equal(jax.tree.map(lambda x, a=replica: x[a], equal), params)
    spread = flatopt.replicate_params(params, 3, std=0.1, key=2)
    cases.assert_equal(jax.tree.map(lambda x: x[0], spread), params)
    kernel = np.asarray(spread["hidden"]["kernel"])
    assert not np.allclose(kernel[1], kernel[2])
    wide = flatopt.replicate_params(jnp.zeros([50_000]), 2, std=0.1)
    np.testing.assert_allclose(np.std(wide[1]), 0.1, rtol=0.02)
    inits = flatopt.replicate_params(
        params, 3, key=2, init_fn=lambda key: optax.tree.random_like(key, params)
    )
    cases.assert_equal(jax.tree.map(lambda x: x[0], inits), params)
    assert not np.allclose(inits["hidden"]["kernel"][1], inits["hidden"]["kernel"][2])
    with pytest.raises(ValueError, match="number=0"):
        flatopt.replicate_params(params, 0)
    with pytest.raises(ValueError, match="std=-1"):
        flatopt.replicate_params(params, 2, std=-1.0)


def test_barycentre_keeps_dtypes_and_takes_the_largest_counter():
    replicas = {
        "half": jnp.array([[1.0], [1.0078125], [1.0078125]], jnp.bfloat16),
        "counter": jnp.array([3, 5, 4]),
        "flag": jnp.array([False, True, False]),
    }
    centre = flatopt.barycentre(replicas)
    assert {k: v.dtype for k, v in centre.items()} == {k: v.dtype for k, v in replicas.items()}
    assert centre["counter"] == 5
    assert bool(centre["flag"])
    assert centre["half"][0] == jnp.bfloat16(1.0052083)


def test_batch_norm_statistics_of_the_centre():
    """Averaged over the replicas, or recomputed at the centre: for one replica they agree."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)
            return nn.Dense(1)(nn.tanh(x))

    model, x = Model(), jax.random.normal(jax.random.key(0), (64, 3))
    variables = model.init(jax.random.key(1), x, train=True)

    def statistics(params):
        _, changed = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return changed["batch_stats"]

    for std in (0.0, 0.3):
        params = flatopt.replicate_params(variables["params"], 3, std=std)
        averaged = flatopt.barycentre(jax.vmap(statistics)(params))
        centre = flatopt.barycentre(params)
        recomputed = statistics(centre)
        means = [s["BatchNorm_0"]["mean"] for s in (averaged, recomputed)]
        variances = [s["BatchNorm_0"]["var"] for s in (averaged, recomputed)]
        # The first layer is linear: means average exactly, variances only for equal replicas.
        np.testing.assert_allclose(*means, atol=1e-5)
        assert np.allclose(*variances, rtol=1e-3) == (std == 0.0)
        normalised = {"params": centre, "batch_stats": recomputed}
        _, kept = model.apply(
            normalised, x, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
        output = kept["intermediates"]["BatchNorm_0"]["__call__"][0]
        scale = centre["BatchNorm_0"]["scale"]
        np.testing.assert_allclose(output.std(0), jnp.abs(scale), rtol=1e-2)


def test_the_centre_of_one_replica_is_that_replica():
    params = cases.init_params()
    cases.assert_equal(flatopt.barycentre(flatopt.replicate_params(params, 1)), params)
